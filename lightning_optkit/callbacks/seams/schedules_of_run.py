# SPDX-License-Identifier: Apache-2.0
"""The torch schedulers of a run: how long they are, how often they were stepped, and the rates that steps used."""

from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor, optim
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, PolynomialLR, ReduceLROnPlateau

from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.diagnostics._observations import ScheduleSeen
from lightning_optkit.step import OnePassOptimizer

__all__ = [
    "SchedulesOfRun",
    "added_decay",
    "base_rate",
    "highest_decay",
    "highest_momentum",
    "highest_rate",
    "rate_to_come",
]

_FADED = 1e-3  # of the highest rate: what is left to come of such steps is a thousandth of one in front
_ADDING = (  # of torch; a later Adam, and AdamW with it, say by a flag that they do not
    optim.SGD, optim.ASGD, optim.Adam, optim.NAdam, optim.RAdam, optim.Adamax, optim.RMSprop, optim.Adagrad,
    optim.Adadelta, OnePassOptimizer,
)  # fmt: skip
_LENGTHS = {CosineAnnealingLR: "T_max", OneCycleLR: "total_steps", PolynomialLR: "total_iters"}


@dataclass
class _Rates:
    steps: int = 0
    zero_first: int = 0
    zero_last: int = 0
    highest: float = 0.0
    faded: int = 0


class SchedulesOfRun:
    """Counts from the start of a fit on.

    Args:
        trainer: The Trainer, as the training starts.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._before = [_count(config.scheduler) for config in trainer.lr_scheduler_configs]
        self.has_any = bool(self._before)
        self._epochs = trainer.current_epoch
        self._rates: dict[Optimizer, _Rates] = {}
        self._at_start: list[int] = []
        self._stepped, self._twice = [[0] * len(self._before) for _ in range(2)]  # batches, by place

    def before_batch(self, trainer: pl.Trainer) -> None:
        """Takes note of the counts before a batch; to be followed by `after_batch`."""
        self._at_start = [_count(config.scheduler) for config in trainer.lr_scheduler_configs[: len(self._before)]]

    def after_batch(self, trainer: pl.Trainer) -> None:
        """Counts the batches in which a scheduler was stepped, and in which more than once."""
        for place, (config, before) in enumerate(zip(trainer.lr_scheduler_configs, self._at_start, strict=False)):
            calls = _count(config.scheduler) - before
            self._stepped[place] += calls > 0
            self._twice[place] += calls > 1

    def after_step(self, optimizer: Optimizer) -> None:
        """Takes note of the rate of a step; a rate that is a tensor is not read."""
        rates = self._rates.get(optimizer)
        if rates is None:
            rates = self._rates[optimizer] = _Rates()
        rate, is_known = 0.0, True
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                is_known = False
            elif group["lr"] > rate:
                rate = group["lr"]
        is_zero = is_known and rate == 0
        if not is_known:
            rate = rates.highest
        rates.zero_first += is_zero and rates.zero_first == rates.steps
        rates.zero_last = rates.zero_last + 1 if is_zero else 0
        if rate > rates.highest:
            rates.highest = rate
        rates.faded = rates.faded + 1 if rate < _FADED * rates.highest else 0
        rates.steps += 1

    def is_warming_up(self) -> bool:
        """Whether an optimizer has not had half of the rate that its scheduler will raise it to."""
        return any(
            rates.highest < 0.5 * rate_to_come(optimizer)
            for optimizer, rates in self._rates.items()
            if not any(isinstance(group["lr"], Tensor) for group in optimizer.param_groups)  # they are not read
        )

    def seen(self, trainer: pl.Trainer) -> list[ScheduleSeen]:
        """All schedulers, and the optimizers without one."""
        run, configs = Run(trainer), list(trainer.lr_scheduler_configs)
        schedulers: list[Any] = [config.scheduler for config in configs]
        found = []
        for optimizer, rates in self._rates.items():
            own = [i for i, each in enumerate(schedulers) if each.optimizer is optimizer and i < len(self._before)]
            found += [self._one(trainer, run, optimizer, rates, configs[place], place) for place in own]
            found += [] if own else [self._one(trainer, run, optimizer, rates, None, 0)]
        return found

    def _one(
        self, trainer: pl.Trainer, run: Run, optimizer: Optimizer, rates: _Rates, config: Any, place: int
    ) -> ScheduleSeen:
        scheduler = None if config is None else config.scheduler
        interval: Literal["step", "epoch", "manual"] = "step" if config is None else config.interval
        if not trainer.lightning_module.automatic_optimization:
            interval = "manual"
        return ScheduleSeen(
            name="" if scheduler is None else type(scheduler).__name__,
            optimizer=type(optimizer).__name__,
            interval=interval,
            frequency=1 if config is None else config.frequency,
            length=None if scheduler is None else _length(scheduler),
            returns=type(scheduler) is CosineAnnealingLR,
            calls=0 if scheduler is None else _count(scheduler) - self._before[place],
            steps=rates.steps,
            epochs=trainer.current_epoch - self._epochs,
            steps_planned=run.steps_at_end(),
            epochs_planned=run.max_epochs,
            zero_first=rates.zero_first,
            zero_last=rates.zero_last,
            follows_metric=isinstance(scheduler, ReduceLROnPlateau),
            faded=rates.faded,
            batches=0 if scheduler is None else self._stepped[place],
            batches_twice=0 if scheduler is None else self._twice[place],
        )


def _count(scheduler: Any) -> int:
    return int(getattr(scheduler, "last_epoch", 0))


def _length(scheduler: Any) -> int | None:
    name = _LENGTHS.get(type(scheduler))
    return None if name is None else int(getattr(scheduler, name))


def base_rate(group: dict[str, Any]) -> float:
    """The rate that schedules multiply; of OneCycleLR the largest. The present one may be that of a warm-up, even 0.

    Example:
        >>> base_rate({"lr": 0.0, "initial_lr": 0.1})
        0.1
    """
    if {"max_lr", "min_lr"} <= group.keys():  # of OneCycleLR
        return float(group["max_lr"])
    return float(group.get("initial_lr", 0.0)) or float(group["lr"])


def highest_decay(optimizer: Optimizer) -> float:
    """The highest product of learning rate and weight decay of its groups."""
    groups = [group for group in optimizer.param_groups if "lr" in group]
    return max((float(group["lr"]) * float(group.get("weight_decay") or 0.0) for group in groups), default=0.0)


def added_decay(optimizer: Optimizer) -> float:
    """The highest weight decay of its groups that is added to the gradient, as in Adam and not in AdamW; 0 for others.

    Example:
        >>> import torch
        >>> params = [torch.nn.Parameter(torch.ones(1))]
        >>> [added_decay(kind(params, weight_decay=0.5)) for kind in (torch.optim.Adam, torch.optim.AdamW)]
        [0.5, 0.0]
    """
    if not isinstance(optimizer, _ADDING):
        return 0.0
    adding = [group for group in optimizer.param_groups if not group.get("decoupled_weight_decay")]
    return max((float(group.get("weight_decay") or 0.0) for group in adding), default=0.0)


def highest_momentum(optimizer: Optimizer) -> float:
    """The highest momentum of its groups: a constant gradient adds up to 1 / (1 - momentum) of it; 0 without."""
    return max((float(group.get("momentum") or 0.0) for group in optimizer.param_groups), default=0.0)


def highest_rate(optimizer: Optimizer) -> float:
    """The highest learning rate of its groups."""
    return max((float(group["lr"]) for group in optimizer.param_groups if "lr" in group), default=float("nan"))


def rate_to_come(optimizer: Optimizer) -> float:
    """The highest rate of its groups that a scheduler of torch has kept to start from or to rise to; 0 without one."""
    kept = [group.get(name) for group in optimizer.param_groups for name in ("initial_lr", "max_lr")]
    return max((float(rate) for rate in kept if rate is not None), default=0.0)
