# SPDX-License-Identifier: Apache-2.0
"""RAdam: Adam that uses its second moment only once its variance is small enough; in one pass.

Source: Liu et al. 2020, arXiv:1908.03265, Algorithm 2.
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

__all__ = ["RAdam", "radam_update"]


def radam_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount RAdam subtracts from `param`, as in csrc/rules/radam.h. Updates `state` in place."""
    beta1, beta2 = group["betas"]
    state["exp_avg"].lerp_(grad, float(1 - beta1))  # m_t
    state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * grad * grad)  # v_t
    correction2 = 1 - beta2**step
    longest = 2 / (1 - beta2) - 1  # rho_inf
    length = longest - 2 * step * beta2**step / correction2  # rho_t
    update: Tensor = state["exp_avg"] * (float(group["lr"]) / float(1 - beta1**step))
    if length <= 5:
        return update
    rectified = ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5
    factor: Tensor = rectified * correction2**0.5 / (state["exp_avg_sq"].sqrt() + group["eps"])
    return update * factor


def _hyperparameters(group: Group) -> Hyperparameters:
    beta1, beta2 = group["betas"]
    return {"beta1": float(beta1), "beta2": float(beta2), "eps": float(group["eps"])}


_RULE = Rule("radam", (StateSpec("exp_avg"), StateSpec("exp_avg_sq", nonnegative=True)), _hyperparameters, radam_update)


class RAdam(OnePassOptimizer, torch.optim.RAdam):
    """RAdam with the arguments of `torch.optim.RAdam`, and every stage of the one-pass step.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Learning rate, in [0, inf), or a 1-element tensor.
        betas: Decay rates of the first and second moment, each in [0, 1).
        eps: Added to the denominator, in [0, inf).
        weight_decay: L2 coefficient, added to the gradient; in [0, inf).
        decoupled_weight_decay: True: decay acts on the parameter instead of the gradient, as in AdamW.
        foreach: As in torch; kept for state dicts. No effect, since there is only one implementation.
        maximize: Ascend.
        capturable: As in torch; kept for state dicts.
        differentiable: Must be False: the step writes in place.
        fused: None: the compiled path where possible. False: plain PyTorch.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.

    Cost: 8 bytes of state per parameter; one pass, two with a clip by norm.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = RAdam([weight], lr=0.1)
        >>> weight.grad = torch.tensor([2.0, -3.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.8000, 1.3000])
    """

    _torch_class: ClassVar[type[Optimizer] | None] = torch.optim.RAdam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
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
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        super().__init__(params, defaults, **stages)

    def _rule(self, group: Group) -> Rule:
        return _RULE

    def _check_group(self, group: Group) -> None:
        check_betas(self._owner, group["betas"])
        check_number(self._owner, "eps", group["eps"], "[0, inf)")
