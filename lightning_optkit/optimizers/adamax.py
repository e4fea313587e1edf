# SPDX-License-Identifier: Apache-2.0
"""Adamax: Adam with the infinity norm; in one pass.

Source: Kingma & Ba 2015, arXiv:1412.6980, Algorithm 2. Differs from it as `torch.optim.Adamax` does: eps is added to
the absolute value of the gradient.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import Unpack

from lightning_optkit.step import OnePassOptimizer, Rule
from lightning_optkit.step.arguments import check_betas, check_number
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["Adamax", "adamax_update"]


def adamax_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount Adamax subtracts from `param`, as in csrc/rules/adamax.h. Updates `state` in place."""
    beta1, beta2 = group["betas"]
    state["exp_avg"].lerp_(grad, float(1 - beta1))  # m_t
    torch.maximum(grad.abs() + group["eps"], state["exp_inf"] * beta2, out=state["exp_inf"])  # u_t
    update: Tensor = state["exp_avg"] * (float(group["lr"]) / float(1 - beta1**step)) / state["exp_inf"]
    return update


def _hyperparameters(group: Group) -> Hyperparameters:
    beta1, beta2 = group["betas"]
    return {"beta1": float(beta1), "beta2": float(beta2), "eps": float(group["eps"])}


_RULE = Rule("adamax", (StateSpec("exp_avg"), StateSpec("exp_inf", nonnegative=True)), _hyperparameters, adamax_update)


class Adamax(OnePassOptimizer, torch.optim.Adamax):
    """Adamax with the arguments of `torch.optim.Adamax`, and every stage of the one-pass step.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Learning rate, in [0, inf), or a 1-element tensor.
        betas: Decay rates of the first moment and of the infinity norm, each in [0, 1).
        eps: Added to the absolute gradient, in [0, inf).
        weight_decay: L2 coefficient, added to the gradient; in [0, inf).
        foreach: As in torch; kept for state dicts. No effect, since there is only one implementation.
        maximize: Ascend.
        differentiable: Must be False: the step writes in place.
        capturable: As in torch; kept for state dicts.
        fused: None: the compiled path where possible. False: plain PyTorch.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.

    Cost: 8 bytes of state per parameter; one pass, two with a clip by norm.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Adamax([weight], lr=0.1)
        >>> weight.grad = torch.tensor([2.0, -3.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])
    """

    _torch_class: ClassVar[type[Optimizer] | None] = torch.optim.Adamax

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        **stages: Unpack[Stages],
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
            fused=fused,
            decoupled_weight_decay=False,
        )
        super().__init__(params, defaults, **stages)

    def _rule(self, group: Group) -> Rule:
        return _RULE

    def _check_group(self, group: Group) -> None:
        check_betas(self._owner, group["betas"])
        check_number(self._owner, "eps", group["eps"], "[0, inf)")
