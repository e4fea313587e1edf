# SPDX-License-Identifier: Apache-2.0
"""Stochastic gradient descent with momentum, dampening and Nesterov's momentum, in one pass.

Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning", Equations 1-4.
Differs from the paper as `torch.optim.SGD` does: the learning rate multiplies the buffer, which starts as the first
gradient.
"""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optkit.step import OnePassOptimizer, Rule, Scalar
from lightning_optkit.step.arguments import check_flag, check_number
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["SGD", "sgd_update"]


def sgd_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount SGD subtracts from `param`, as in csrc/rules/sgd.h. Updates `state` in place."""
    direction, momentum = grad, float(group["momentum"])
    if "momentum_buffer" in state:
        buffer = state["momentum_buffer"]
        if state["momentum_step"] == 0:
            buffer.copy_(grad)
        else:
            buffer.mul_(momentum).add_((1 - float(group["dampening"])) * grad)
        state["momentum_step"] += 1.0
        direction = grad + momentum * buffer if group["nesterov"] else buffer
    return direction * float(group["lr"])


def _hyperparameters(group: Group) -> Hyperparameters:
    return {
        "momentum": float(group["momentum"]),
        "dampening": float(group["dampening"]),
        "nesterov": float(group["nesterov"]),
    }


# The first update of a buffer, whenever momentum was turned on, copies the gradient without dampening.
_MOMENTUM_STEP = Scalar("momentum_step", fresh=0.0, inherited=1.0)
_SGD = Rule(
    "sgd",
    (StateSpec("momentum_buffer", kept=lambda group: bool(group["momentum"] != 0)),),
    _hyperparameters,
    sgd_update,
    (_MOMENTUM_STEP,),
    counts_steps=False,
)


class SGD(OnePassOptimizer, torch.optim.SGD):
    """SGD with the arguments of `torch.optim.SGD`, and every stage of the one-pass step.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Learning rate, in [0, inf), or a 1-element tensor.
        momentum: Decay rate of the momentum buffer, in [0, inf); 0: no buffer.
        dampening: Fraction of the gradient that does not enter the buffer.
        weight_decay: L2 coefficient, added to the gradient; in [0, inf).
        nesterov: Use Nesterov momentum; requires momentum without dampening.
        maximize: Ascend.
        foreach: As in torch; kept for state dicts. No effect, since there is only one implementation.
        differentiable: Must be False: the step writes in place.
        fused: None: the compiled path where possible. False: plain PyTorch.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.
        RuntimeError: for `fused=True` with `foreach=True`, as in torch.

    Cost: 4 bytes of state per parameter with momentum, else none; one pass, two with a clip.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = SGD([weight], lr=0.5, momentum=0.9)
        >>> weight.grad = torch.tensor([1.0, -1.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.5000, 1.5000])
    """

    _torch_class = torch.optim.SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **stages: Unpack[Stages],
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=False,
        )
        super().__init__(params, defaults, **stages)

    def _rule(self, group: Group) -> Rule:
        return _SGD

    def _check_group(self, group: Group) -> None:
        check_flag(self._owner, "nesterov", group["nesterov"])
        check_number(self._owner, "momentum", group["momentum"], "[0, inf)")
        check_number(self._owner, "dampening", group["dampening"], "(-inf, inf)")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(f"{self._owner}(nesterov=True): needs momentum > 0 and dampening = 0.")
