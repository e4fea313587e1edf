# SPDX-License-Identifier: Apache-2.0
"""Schedules any other hyperparameter of an unchanged run: weight decay, momentum, betas, dropout, ..."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_optkit._checks import check_bools, check_in, check_text
from lightning_optkit.callbacks._held import HELD, Held
from lightning_optkit.callbacks.scheduling.clock import Interval
from lightning_optkit.callbacks.scheduling.group_targets import entry_names, group_targets, keeper_of, normalized
from lightning_optkit.callbacks.scheduling.scheduled_callback import ScheduledCallback, Target
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.lightning_private import key_of_state, logs_now
from lightning_optkit.callbacks.weight_averaging import WeightAveraging
from lightning_optkit.schedules import Schedule

__all__ = ["HyperparameterSchedule"]

_RANGES = {"dropout": "[0, 1]", "gradient_clip_val": "(0, inf)", "beta2_decay": "(-inf, 0]"}
_BELOW_ONE = {"betas", "adamw_betas", "momentum", "dampening", "average_decay", "rho"}


class HyperparameterSchedule(ScheduledCallback):
    """Multiplies one hyperparameter by a schedule, in each group, counted as in `LRSchedule`.

    There may be several, one for each name. Values outside the optimizer (dropout, `gradient_clip_val`, a clip, the
    `l1` of `ElasticNet`) are restored after the fit.

    Args:
        name: An entry of the parameter groups ("weight_decay", "momentum", "eps", ...; "average_decay" is that of an
            `EMA`, "l1" also that of `ElasticNet`), an element of one ("beta1", "beta2" or "betas[0]"), "dropout" (the
            `p` of every dropout module of torch and of `lightning_optkit.layers`, and the dropout inside attention,
            recurrent and add + norm layers if it is not 0), or "gradient_clip_val" (the Trainer's, and the bound of a
            `ClipNorm`, `ClipPerTensor` or `ClipValue` in `GradientClipping` or the optimizer).
        schedule: The factor as a function of progress.
        interval: Unit of integer lengths, see `LRSchedule`.
        base: Value at factor 1, for all groups. Default: each group's (module's) own.
        total: Length of the run in that unit. Default: derived from the Trainer, except for tokens.
        count: Samples or tokens of a batch, see `LRSchedule`.
        log: Log the value, under its name, if there is a logger.
        verbose: Print schedule, length and base values when training starts.

    Raises:
        ValueError: for an argument out of range; when the fit starts, for entries that the rule itself writes or
            counts; when the training starts, if there is no hyperparameter of this name (both messages list the
            existing ones), if every base value is 0, if a value would leave its range, or if the schedule does not fit
            into the run.

    Example:
        >>> from lightning_optkit.schedules import cosine, linear
        >>> decay = HyperparameterSchedule("weight_decay", cosine(min_factor=0.1))
        >>> dropout = HyperparameterSchedule("dropout", linear(0.0, 1.0), base=0.5)
        >>> trainer = pl.Trainer(callbacks=[decay, dropout], logger=False)
    """

    def __init__(
        self,
        name: str,
        schedule: Schedule,
        interval: Interval = "step",
        *,
        base: float | None = None,
        total: int | None = None,
        count: Callable[[Any], int] | None = None,
        log: bool = True,
        verbose: bool = True,
    ) -> None:
        check_text(self._owner, "name", name, 'a hyper-parameter, such as "weight_decay"')
        check_bools(self._owner, log=log)
        self.name = normalized(name)
        if self.name == "lr":
            raise ValueError(f"{self._owner}(name='lr'): use LRSchedule for the learning rate.")
        super().__init__(schedule, interval, total, count, verbose)
        if base is not None:
            check_in(self._owner, "base", base, _range_of(self.name))
        self._base, self._log = base, log
        self._held: list[Held] = []

    @property
    def _call(self) -> str:
        """The beginning of an error message about the hyperparameter."""
        return f"{self._owner}(name={self.name!r}):"

    @property
    def state_key(self) -> str:
        """One state per name; Lightning refuses two with the same name."""
        return key_of_state(self, name=self.name)

    # --- hooks, in the order Lightning calls them ---

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        keeper = keeper_of(trainer.optimizers, self.name)
        if keeper is not None and not group_targets(trainer.optimizers, self.name, self._base):
            known = self._known(trainer, pl_module)
            raise ValueError(f"{self._call} {type(keeper).__name__} keeps it for itself; there are {known}.")
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._held = list(HELD[self.name](trainer, pl_module)) if self.name in HELD else []
        for held in self._held:
            self._at_end(held.undo)
        if self.name == "average_decay":
            _show_average_decay(trainer)
        targets = self._targets(trainer, pl_module)
        if not targets:
            raise ValueError(f"{self._call} nothing here has it; there are {self._known(trainer, pl_module)}.")
        if self._base is None and not any(target.base for target in targets):
            raise ValueError(f"{self._call} it is 0 everywhere, and would stay 0; give base.")
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._log and trainer.loggers and logs_now(trainer):
            pl_module.log_dict(self.values, batch_size=1)

    # --- implementation ---

    def _targets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Target]:
        held = [Target(self.name, self._base_of(held), held.write) for held in self._held]
        # An entry of a callback's own would be applied a second time by the optimizer.
        return [*group_targets(trainer.optimizers, self.name, None if held else self._base), *held]

    @staticmethod
    def _known(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        """The hyperparameters that can be scheduled."""
        held = [name for name, found in HELD.items() if any(True for _ in found(trainer, pl_module))]
        return ", ".join(name for name in dict.fromkeys([*entry_names(trainer.optimizers), *held]) if name != "lr")

    def _base_of(self, held: Held) -> float:
        return held.value if self._base is None else self._base

    def _check_run(self, trainer: pl.Trainer) -> None:
        super()._check_run(trainer)
        if self._fits:
            bases = {target.base for target in self._targets(trainer, trainer.lightning_module)}
            for position in self._positions():
                factor = self.schedule(position, self._clock.total)
                for base in bases:
                    self._check_value(base * factor, position)

    def _check_value(self, value: float, position: float) -> None:
        interval = _range_of(self.name)
        try:
            check_in(self._owner, self.name, value, interval)
        except ValueError:
            raise ValueError(
                f"{self._owner}(schedule={self.schedule!r}): {self.name} would be {value:g} at "
                f"{self._clock.interval} {position:g}; it must be in {interval}."
            ) from None

    def _forget(self) -> None:
        self._held = []


def _range_of(name: str) -> str:
    return _RANGES.get(name) or ("[0, 1)" if name.split("[")[0] in _BELOW_ONE else "[0, inf)")


def _show_average_decay(trainer: pl.Trainer) -> None:
    """An average outside of the step has no decay entry in the groups yet."""
    for averaging in callbacks_of(trainer, WeightAveraging):
        decay = averaging.scheduled_decay
        for optimizer in trainer.optimizers if decay is not None else ():
            for group in optimizer.param_groups:
                group.setdefault("average_decay", decay)
