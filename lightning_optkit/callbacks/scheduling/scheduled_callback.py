# SPDX-License-Identifier: Apache-2.0
"""Base of LRSchedule and HyperparameterSchedule: writes the scheduled value at the right moments.

It is not an LRSchedulerConfig: Lightning restores schedulers by their position in a list, does not step them with
manual optimization, and a scheduler has a counter to restore. A value that is a pure function of the trainer's own
progress needs no state, and adapts to the length of the run.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_optkit._checks import check_bools, check_state
from lightning_optkit.callbacks.scheduling.clock import Clock, Interval
from lightning_optkit.callbacks.scheduling.foreign_values import ForeignValues
from lightning_optkit.callbacks.scheduling.target import Target
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.refusals import refuse_listed_twice
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.schedules import Schedule
from lightning_optkit.schedules.schedule import check_schedule

__all__ = ["ScheduledCallback"]

_LOOKED_AT = 1_000  # points of the run that are checked before it starts


class ScheduledCallback(FitCallback):
    """Writes `base * schedule(position, total)` before training and after each optimizer step."""

    name: str

    def __init__(
        self,
        schedule: Schedule,
        interval: Interval,
        total: int | None,
        count: Callable[[Any], int] | None,
        verbose: bool,
    ) -> None:
        check_bools(self._owner, verbose=verbose)
        check_schedule(self._owner, "schedule", schedule)
        self.schedule, self._verbose = schedule, verbose
        self._clock = Clock(self._owner, interval, total, count)
        self._arguments = dict(interval=interval, total=total, count=count)
        self._fits, self._resumed_from = True, repr(schedule)
        self._factor: tuple[tuple[Schedule, float, int | None], float] | None = None  # where, and what it is there
        self._foreign = ForeignValues(self._owner, self.name)
        self.values: dict[str, float] = {}  # the last written values, by label

    @property
    def _owner(self) -> str:
        return type(self).__name__

    def _targets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Target]:
        """Looked up at each write, since groups are added, and replaced when a state dict is loaded."""
        raise NotImplementedError

    def _check_value(self, value: float, position: float) -> None:
        """Raises for a value outside the range of its target."""

    def state_dict(self) -> dict[str, Any]:
        """The schedule's `repr`, and the number of samples or tokens so far."""
        return {
            "schedule": repr(self.schedule),
            "counted": self._clock.counted,
            "pending": self._clock.pending,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the count."""
        state = check_state(self._owner, state_dict, counted=int, pending=int, schedule=str)
        self._clock.counted, self._clock.pending = state["counted"], state["pending"]
        self._resumed_from = state["schedule"]

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_listed_twice(self, trainer)
            self._clock.counted = self._clock.pending = 0
            self._fits, self._resumed_from = True, repr(self.schedule)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Stores the base values in the groups: a sharded checkpoint restores only existing entries.
        self._targets(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not earlier: optimizers have restored their state, and other callbacks have changed the steps.
        if self._resumed_from != repr(self.schedule):
            rank_zero_warn(f"{self._owner}: resumed with {self.schedule!r} in place of {self._resumed_from}.")
        self._clock.start(trainer, pl_module)
        self._check_run(trainer)
        self._write(trainer, pl_module)
        if self._verbose and self._fits and (targets := self._targets(trainer, pl_module)):  # none without optimizers
            bases = sorted({f"{target.base:g}" for target in targets}, key=float)
            what = bases[0] if len(bases) == 1 else f"{bases[0]} to {bases[-1]}"
            over = "" if self._clock.total is None else f", over {self._clock.describe()}"
            rank_zero_info(f"{self._owner}: {self.name} {what} times {self.schedule!r}{over}")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before = self._clock.total
        self._clock.look_at_epoch(Run(trainer))
        if self._clock.total != before and self._fits and not self._takes_length():
            rank_zero_warn(
                f"{self._owner}(schedule={self.schedule!r}): with the loader of epoch {trainer.current_epoch} the run "
                f"has {self._clock.describe()}, too few for the schedule; it goes on as for {before}."
            )
            self._clock.total = before
        self._write(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._write(trainer, pl_module)  # for groups added since

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._clock.add(trainer, pl_module, batch)
        self._write(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module)

    # --- implementation ---

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._fits:
            return
        position = self._clock.position(trainer, pl_module)
        at = (self.schedule, position, self._clock.total)
        if self._factor is None or self._factor[0] != at:  # a batch starts where the one before has ended
            self._factor = at, self.schedule(position, self._clock.total)
        self._foreign.look(trainer)
        targets, factor = self._targets(trainer, pl_module), self._factor[1]
        self.values = {target.label: target.base * factor for target in targets}
        for target in targets:
            self._check_value(target.base * factor, position)
            target.write(target.base * factor)
        self._foreign.keep(trainer)

    def _forget(self) -> None:
        self._foreign = ForeignValues(self._owner, self.name)

    def _positions(self) -> list[float]:
        """Positions to check before training starts; the last value is written after the last step."""
        total = self._clock.total
        return [0.0] if total is None else [total * part / _LOOKED_AT for part in range(_LOOKED_AT + 1)]

    def _takes_length(self) -> bool:
        try:
            for position in self._positions():
                self.schedule(position, self._clock.total)
        except ValueError:
            return False
        return True

    def _check_run(self, trainer: pl.Trainer) -> None:
        """Raises if the schedule needs an unknown length, or does not fit into the run."""
        total = self._clock.total
        try:
            for position in self._positions():  # later parts may not fit either
                self.schedule(position, total)
        except ValueError as error:
            self._fits = False
            if trainer.fast_dev_run:  # type: ignore[attr-defined]
                rank_zero_info(f"{self._owner}: not applied to these {self._clock.describe()} of fast_dev_run.")
                return
            call = f"{self._owner}(schedule={self.schedule!r})"
            if total is None:
                reason = str(error).split("because ")[-1].removesuffix(".")
                raise ValueError(
                    f"{call}: the length of the run in {self._clock.interval}s is not known (max_epochs="
                    f"{trainer.max_epochs}, max_steps={trainer.max_steps}), and {reason}; "
                    f"set {self._clock.remedy(trainer)}."
                ) from None
            raise ValueError(f"{call}: the run has {self._clock.describe()}, but {error}") from None
