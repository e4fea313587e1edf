# SPDX-License-Identifier: Apache-2.0
"""Schedule-free SGD: averaging replaces momentum and the schedule; in one pass.

Source: Defazio et al. 2024, arXiv:2405.15682, Equations 2-4; warm-up and weights as in its Algorithm 1.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optkit._checks import shown
from lightning_optkit.optimizers._schedule_free import (
    WEIGHT_SUM,
    ScheduleFreeOptimizer,
    average_hyperparameters,
    move,
    rate_and_share,
)
from lightning_optkit.step import Rule
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["ScheduleFreeSGD", "schedule_free_sgd_update"]


def schedule_free_sgd_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount to subtract from y, as in csrc/rules/schedule_free.h. Updates `state` in place."""
    if step == 1:
        state["z"].copy_(param)
    rate, share = rate_and_share(state, group, step, 1.0)
    return move(param, grad, state["z"], group["momentum"], rate, share)


def _hyperparameters(group: Group) -> Hyperparameters:
    return {"momentum": float(group["momentum"]), **average_hyperparameters(group)}


_RULE = Rule("schedule_free_sgd", (StateSpec("z"),), _hyperparameters, schedule_free_sgd_update, WEIGHT_SUM)


class ScheduleFreeSGD(ScheduleFreeOptimizer):
    """Schedule-free SGD, with the arguments of the authors' implementation.

    During training the parameters hold y, where gradients are taken. `eval()` switches them to the average x, which is
    to be evaluated and saved, and `train()` switches back. `step` raises until `train()` was called. In a Lightning
    Trainer `callbacks.ScheduleFree` (which `Fuse` adds) does both. No schedule for `lr` is needed; if it changes, the
    weights of the average follow the largest rate so far, warm-up included.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Learning rate, in [0, inf), or a 1-element tensor; larger than SGD's.
        momentum: Weight of the average in the point where gradients are taken, in (0, 1).
        weight_decay: L2 coefficient, added to the gradient at y; in [0, inf).
        warmup_steps: Steps over which `lr` grows linearly from 0, at least 0.
        r: Step t has weight t**r in the average, in [0, inf).
        weight_lr_power: Exponent of the rate, a second factor of that weight; in [0, inf).
        maximize: Ascend.
        fused: None: the compiled path where possible. False: plain PyTorch.
        average: Must be None: the rule keeps an average itself.
        l1: Must be 0: zeros of y are not zeros of the average.
        cautious: Must be False: y and z decay by the same amount.
        caution: Must be False: y and z follow the same direction.
        state_dtype: Must be torch.float32: z is a point, so small updates of it would be lost.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.

    Cost: 4 bytes of state per parameter, 4 more while it is evaluated; one pass, two with a clip by norm.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = ScheduleFreeSGD([weight], lr=0.1)
        >>> optimizer.train()
        >>> weight.grad = torch.tensor([2.0, -3.0])
        >>> optimizer.step()
        >>> optimizer.eval()
        >>> weight.data
        tensor([0.8000, 1.3000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
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
        state_dtype = stages.get("state_dtype", torch.float32)
        if state_dtype is not torch.float32:
            raise ValueError(
                f"{self._owner}(state_dtype={shown(state_dtype)}): must be torch.float32; z is a point, and small "
                "steps of it would be lost."
            )
        defaults = dict(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            decoupled_weight_decay=False,
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
        return "momentum", group["momentum"]
