# SPDX-License-Identifier: Apache-2.0
"""Schedule-free AdamW: averaging replaces both momentum and the schedule; in one pass.

Source: Defazio et al. 2024, arXiv:2405.15682, Algorithm 1. There the rate of step t contains sqrt(1 - beta2^t); the
authors' package `schedulefree` has this factor in the update alone, see the class.
"""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optkit.optimizers._schedule_free import (
    WEIGHT_SUM,
    ScheduleFreeOptimizer,
    average_hyperparameters,
    move,
    rate_and_share,
)
from lightning_optkit.step import Rule
from lightning_optkit.step.arguments import check_number, pair
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec, decay_per_rate
from lightning_optkit.step.stages import Stages

__all__ = ["ScheduleFreeAdamW", "schedule_free_adamw_update"]


def schedule_free_adamw_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount to subtract from y, as in csrc/rules/schedule_free.h. Updates `state` in place."""
    beta1, beta2 = group["betas"]
    if step == 1:
        state["z"].copy_(param)
    rate, share = rate_and_share(state, group, step, (1 - beta2**step) ** 0.5)
    state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * grad * grad)  # v_t
    direction = grad / (state["exp_avg_sq"].sqrt() + group["eps"]) + decay_per_rate(group) * param
    return move(param, direction, state["z"], beta1, rate, share)


def _hyperparameters(group: Group) -> Hyperparameters:
    beta1, beta2 = group["betas"]
    return {
        "beta1": float(beta1),
        "beta2": float(beta2),
        "eps": float(group["eps"]),
        "decay": decay_per_rate(group),
        **average_hyperparameters(group),
    }


_STATES = (StateSpec("z", full_precision=True), StateSpec("exp_avg_sq", nonnegative=True))
_RULE = Rule(
    "schedule_free_adamw",
    _STATES,
    _hyperparameters,
    schedule_free_adamw_update,
    WEIGHT_SUM,
    owns_decay=lambda group: True,  # at y, and it moves z too
)


class ScheduleFreeAdamW(ScheduleFreeOptimizer):
    """Schedule-free AdamW, with the arguments of the authors' package `schedulefree`.

    During training the parameters hold y, where gradients are taken. `eval()` switches them to the average x, which is
    to be evaluated and saved, and `train()` switches back. `step` raises until `train()` was called. In a Lightning
    Trainer `callbacks.ScheduleFree` (which `Fuse` adds) does both. No schedule for `lr` is needed; if it changes, the
    weights of the average follow the largest rate so far, warm-up included.

    It is Algorithm 1 of the paper, where the bias correction sqrt(1 - beta2^t) is a factor of the rate. In the package
    (1.4) it corrects the second moment alone, so that the decay, and the weight of a step in the average, lack it: the
    first steps (about 1 / (1 - beta2) of them) count more in the average of the package, and x differs by some percent.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Learning rate, in [0, inf), or a 1-element tensor; 1 to 10 times AdamW's.
        betas: Weight of the average in the point where gradients are taken, in (0, 1), and decay rate of the second
            moment, in [0, 1).
        eps: Added to the denominator, in [0, inf).
        weight_decay: Decay at y, times `lr`, of y and z alike; in [0, inf).
        warmup_steps: Steps over which `lr` grows linearly from 0, at least 0.
        r: Step t has weight t**r in the average, in [0, inf).
        weight_lr_power: Exponent of the rate, a second factor of that weight; in [0, inf).
        maximize: Ascend.
        fused: None: the compiled path where possible. False: plain PyTorch.
        average: Must be None: the rule keeps an average itself.
        l1: Must be 0: zeros of y are not zeros of the average.
        cautious: Must be False: y and z decay by the same amount.
        caution: Must be False: y and z follow the same direction.
        state_dtype: Dtype of the second moment; that of fp64 parameters is fp64; "int8" for one byte. z stays in fp32:
            it is a point, so small updates of it would be lost.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.

    Cost: 8 bytes of state per parameter, 4 more while it is evaluated; one pass, two with a clip by norm.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = ScheduleFreeAdamW([weight], lr=0.1)
        >>> optimizer.train()
        >>> weight.grad = torch.tensor([2.0, -3.0])
        >>> optimizer.step()
        >>> optimizer.eval()
        >>> weight.data
        tensor([0.9000, 1.1000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        **stages: Unpack[Stages],
    ) -> None:
        self._check_no_average(stages.get("average"))
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=True,
            warmup_steps=warmup_steps,
            r=r,
            weight_lr_power=weight_lr_power,
            lr_max=0.0,
            train_mode=False,
            maximize=maximize,
            fused=fused,
        )
        super().__init__(params, defaults, **stages)

    def _rule(self, group: Group) -> Rule:
        return _RULE

    def _given_beta(self, group: Group) -> tuple[str, Any]:
        return "betas[0]", pair(self._owner, "betas", group["betas"])[0]

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_number(self._owner, "betas[1]", group["betas"][1], "[0, 1)")
        check_number(self._owner, "eps", group["eps"], "[0, inf)")
