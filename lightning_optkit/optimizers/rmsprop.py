# SPDX-License-Identifier: Apache-2.0
"""RMSprop, plain or centered, with momentum; in one pass.

Source: Tieleman & Hinton 2012, "Lecture 6.5: rmsprop", COURSERA; centered, Graves 2013, arXiv:1308.0850, Equations
38-45. As in `torch.optim.RMSprop`, and unlike Graves, eps is outside the square root.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import Unpack

from lightning_optkit.step import OnePassOptimizer, Rule
from lightning_optkit.step.arguments import check_flag, check_number
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["RMSprop", "rmsprop_update"]


def rmsprop_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount RMSprop subtracts from `param`, as in csrc/rules/rmsprop.h. Updates `state` in place."""
    alpha = group["alpha"]
    state["square_avg"].mul_(alpha).add_((1 - alpha) * grad * grad)
    variance = state["square_avg"]
    if "grad_avg" in state:
        state["grad_avg"].lerp_(grad, float(1 - alpha))
        # With rounding, the variance of a constant gradient can be slightly negative; torch's root is then NaN.
        variance = (variance - state["grad_avg"] * state["grad_avg"]).clamp(min=0)
    direction = grad / (variance.sqrt() + group["eps"])
    if "momentum_buffer" in state:
        direction = state["momentum_buffer"].mul_(group["momentum"]).add_(direction)
    update: Tensor = direction * float(group["lr"])
    return update


def _hyperparameters(group: Group) -> Hyperparameters:
    return {
        "alpha": float(group["alpha"]),
        "eps": float(group["eps"]),
        "momentum": float(group["momentum"]),
        "centered": float(group["centered"]),
    }


_RULE = Rule(
    "rmsprop",
    (
        StateSpec("square_avg", nonnegative=True),
        StateSpec("momentum_buffer", kept=lambda group: bool(group["momentum"] > 0)),
        StateSpec("grad_avg", kept=lambda group: bool(group["centered"])),
    ),
    _hyperparameters,
    rmsprop_update,
)


class RMSprop(OnePassOptimizer, torch.optim.RMSprop):
    """RMSprop with the arguments of `torch.optim.RMSprop`, and every stage of the one-pass step.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Learning rate, in [0, inf), or a 1-element tensor.
        alpha: Decay rate of the mean square, in [0, inf).
        eps: Added to the denominator, in [0, inf).
        weight_decay: L2 coefficient, added to the gradient; in [0, inf).
        momentum: Decay rate of the momentum buffer, in [0, inf); 0: no buffer.
        centered: Divide by the standard deviation instead of the root mean square.
        capturable: As in torch; kept for state dicts.
        foreach: As in torch; kept for state dicts. No effect, since there is only one implementation.
        maximize: Ascend.
        differentiable: Must be False: the step writes in place.
        fused: None: the compiled path where possible. False: plain PyTorch.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.

    Cost: 4 bytes of state per parameter, 4 more with momentum, 4 more when centered; one pass, two with a clip by norm.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = RMSprop([weight], lr=0.01)
        >>> weight.grad = torch.tensor([2.0, -3.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])
    """

    _torch_class: ClassVar[type[Optimizer] | None] = torch.optim.RMSprop

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        **stages: Unpack[Stages],
    ) -> None:
        defaults = dict(
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=False,
        )
        super().__init__(params, defaults, **stages)

    def _rule(self, group: Group) -> Rule:
        return _RULE

    def _check_group(self, group: Group) -> None:
        check_flag(self._owner, "centered", group["centered"])
        check_number(self._owner, "alpha", group["alpha"], "[0, inf)")
        check_number(self._owner, "eps", group["eps"], "[0, inf)")
        check_number(self._owner, "momentum", group["momentum"], "[0, inf)")
