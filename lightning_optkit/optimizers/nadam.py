# SPDX-License-Identifier: Apache-2.0
"""NAdam: Adam with Nesterov momentum and a momentum warmup; in one pass.

Source: Dozat 2016, "Incorporating Nesterov Momentum into Adam", Algorithm 2 and the momentum schedule beside it, with
the constants of `torch.optim.NAdam`.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import Unpack

from lightning_optkit.step import OnePassOptimizer, Rule, Scalar
from lightning_optkit.step.arguments import check_betas, check_number
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["NAdam", "nadam_update"]


def nadam_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount NAdam subtracts from `param`, as in csrc/rules/nadam.h. Updates `state` in place."""
    beta1, beta2 = group["betas"]
    decay, lr = group["momentum_decay"], float(group["lr"])
    mu = beta1 * (1 - 0.5 * 0.96 ** (step * decay))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * decay))
    state["mu_product"] *= mu
    mu_product = float(state["mu_product"])
    state["exp_avg"].lerp_(grad, float(1 - beta1))  # m_t
    state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * grad * grad)  # n_t
    denom = state["exp_avg_sq"].sqrt() * (1 - beta2**step) ** -0.5 + group["eps"]
    grad_step, momentum_step = lr * (1 - mu) / (1 - mu_product), lr * mu_next / (1 - mu_product * mu_next)
    update: Tensor = (grad_step * grad + momentum_step * state["exp_avg"]) / denom
    return update


def _hyperparameters(group: Group) -> Hyperparameters:
    beta1, beta2 = group["betas"]
    return {
        "beta1": float(beta1),
        "beta2": float(beta2),
        "eps": float(group["eps"]),
        "momentum_decay": float(group["momentum_decay"]),
    }


_MU_PRODUCT = Scalar("mu_product", fresh=1.0, inherited=1.0)
_RULE = Rule(
    "nadam",
    (StateSpec("exp_avg"), StateSpec("exp_avg_sq", nonnegative=True)),
    _hyperparameters,
    nadam_update,
    (_MU_PRODUCT,),
)


class NAdam(OnePassOptimizer, torch.optim.NAdam):
    """NAdam with the arguments of `torch.optim.NAdam`, and every stage of the one-pass step.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Learning rate, in [0, inf), or a 1-element tensor.
        betas: Decay rates of the first and second moment, each in [0, 1).
        eps: Added to the denominator, in [0, inf).
        weight_decay: L2 coefficient, added to the gradient; in [0, inf).
        momentum_decay: Speed of the momentum warmup, in [0, inf).
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
        >>> optimizer = NAdam([weight], lr=0.1)
        >>> weight.grad = torch.tensor([2.0, -3.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.8944, 1.1056])
    """

    _torch_class: ClassVar[type[Optimizer] | None] = torch.optim.NAdam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
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
            momentum_decay=momentum_decay,
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
        check_number(self._owner, "momentum_decay", group["momentum_decay"], "[0, inf)")
