# SPDX-License-Identifier: Apache-2.0
"""Adadelta: steps in the units of the parameter, from the history of the steps themselves; in one pass.

Source: Zeiler 2012, arXiv:1212.5701, Algorithm 1. Differs from it as `torch.optim.Adadelta` does: a learning rate
multiplies the step.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import Unpack

from lightning_optkit.step import OnePassOptimizer, Rule
from lightning_optkit.step.arguments import check_number
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["Adadelta", "adadelta_update"]


def adadelta_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount Adadelta subtracts from `param`, as in csrc/rules/adadelta.h. Updates `state` in place."""
    rho, eps = group["rho"], group["eps"]
    state["square_avg"].mul_(rho).add_((1 - rho) * grad * grad)  # E[g^2]_t
    delta = (state["acc_delta"] + eps).sqrt() / (state["square_avg"] + eps).sqrt() * grad
    state["acc_delta"].mul_(rho).add_((1 - rho) * delta * delta)  # E[dx^2]_t
    update: Tensor = delta * float(group["lr"])
    return update


def _hyperparameters(group: Group) -> Hyperparameters:
    return {"rho": float(group["rho"]), "eps": float(group["eps"])}


_RULE = Rule(
    "adadelta",
    (StateSpec("square_avg", nonnegative=True), StateSpec("acc_delta", nonnegative=True)),
    _hyperparameters,
    adadelta_update,
)


class Adadelta(OnePassOptimizer, torch.optim.Adadelta):
    """Adadelta with the arguments of `torch.optim.Adadelta`, and every stage of the one-pass step.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Learning rate, in [0, inf), or a 1-element tensor.
        rho: Decay rate of both mean squares, in [0, 1].
        eps: Added to the denominator, in [0, inf).
        weight_decay: L2 coefficient, added to the gradient; in [0, inf).
        foreach: As in torch; kept for state dicts. No effect, since there is only one implementation.
        capturable: As in torch; kept for state dicts.
        maximize: Ascend.
        differentiable: Must be False: the step writes in place.
        fused: None: the compiled path where possible. False: plain PyTorch.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.

    Cost: 8 bytes of state per parameter; one pass, two with a clip by norm.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Adadelta([weight], lr=100.0)
        >>> weight.grad = torch.tensor([2.0, -3.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.6838, 1.3162])
    """

    _torch_class: ClassVar[type[Optimizer] | None] = torch.optim.Adadelta

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **stages: Unpack[Stages],
    ) -> None:
        defaults = dict(
            lr=lr,
            rho=rho,
            eps=eps,
            weight_decay=weight_decay,
            foreach=foreach,
            capturable=capturable,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=False,
        )
        super().__init__(params, defaults, **stages)

    def _rule(self, group: Group) -> Rule:
        return _RULE

    def _check_group(self, group: Group) -> None:
        check_number(self._owner, "rho", group["rho"], "[0, 1]")
        check_number(self._owner, "eps", group["eps"], "[0, inf)")
