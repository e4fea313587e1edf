# SPDX-License-Identifier: Apache-2.0
"""Any schedule on any other hyper-parameter of an unchanged run: weight decay, momentum, betas, dropout, ..."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_optkit._checks import check_in
from lightning_optkit.callbacks._clock import Interval
from lightning_optkit.callbacks._entries import entry_names, group_targets, normalized
from lightning_optkit.callbacks._scheduled import ScheduledCallback, Target
from lightning_optkit.callbacks.weight_averaging import WeightAveraging
from lightning_optkit.clipping import ClipNorm, ClipValue
from lightning_optkit.schedules import Schedule
from lightning_optkit.step import OnePassOptimizer

__all__ = ["HyperparameterSchedule"]

_DROPOUT, _CLIP, _AVERAGE = "dropout", "gradient_clip_val", "average_decay"
_BELOW_ONE = {"betas", "momentum", "dampening", "average_decay", "alpha", "beta2_decay"}


class HyperparameterSchedule(ScheduledCallback):
    """Multiplies one hyper-parameter by a schedule, group by group, counted as in `LRSchedule`.

    Several stand side by side, one for each name. What is not in the optimizer (dropout, `gradient_clip_val`, a folded
    clip) has its old value again after the fit.

    Args:
        name: An entry of the parameter groups ("weight_decay", "momentum", "l1", "average_decay", "eps", ...), an
            element of one ("beta1", "beta2" or "betas[0]"), "dropout" (the `p` of every dropout module of torch, and
            the dropout inside attention and recurrent layers where it is not 0), or "gradient_clip_val" (the Trainer's,
            also where `Fuse` has folded it in, and the clip of a one-pass optimizer).
        schedule: The factor as a function of progress.
        interval: Unit of the ints in it, as in `LRSchedule`.
        base: Value at factor 1, for all groups. Default: each group's (module's) own.
        total: Length of the run in that unit. Default: found by itself, but for tokens.
        count: Samples or tokens of a batch, as in `LRSchedule`.
        log: Log the value, under its name, when a logger takes it.
        verbose: Print schedule, length and base values when training starts.

    Raises:
        ValueError: for an argument out of range; when the training starts, if nothing has a hyper-parameter of this
            name (the message lists those that there are), if every base value is 0, if a value would leave its range,
            or if the schedule does not fit into the run.

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
        self.name = normalized(name)
        if self.name == "lr":
            raise ValueError("HyperparameterSchedule(name='lr'): use LRSchedule for the learning rate.")
        super().__init__(schedule, interval, total, count, verbose)
        if base is not None:
            check_in(self._owner, "base", base, _range_of(self.name))
        self._base, self._log = base, log
        self._dropouts: list[tuple[nn.Module, str, float]] = []
        self._clips: list[tuple[Any, str, Any]] = []

    @property
    def _owner(self) -> str:
        return "HyperparameterSchedule"

    @property
    def state_key(self) -> str:
        """One state for each name; Lightning refuses two of one name."""
        return self._generate_state_key(name=self.name)

    # --- hooks, in the order Lightning calls them ---

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._dropouts = list(_dropouts(pl_module, self._base)) if self.name == _DROPOUT else []
        self._clips = list(_clips(trainer)) if self.name == _CLIP else []
        if self.name == _AVERAGE:
            _show_average_decay(trainer)
        targets = self._targets(trainer, pl_module)
        if not targets:
            known = [*entry_names(trainer.optimizers)]
            known += [_DROPOUT] if any(_dropouts(pl_module, 1.0)) else []
            known += [_CLIP] if any(_clips(trainer)) else []
            raise ValueError(
                f"HyperparameterSchedule(name={self.name!r}): nothing here has it; there are "
                f"{', '.join(name for name in known if name != 'lr')}."
            )
        if self._base is None and not any(target.base for target in targets):
            raise ValueError(
                f"HyperparameterSchedule(name={self.name!r}): it is 0 everywhere, and would stay 0; give base."
            )
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._log and trainer.loggers and trainer._logger_connector.should_update_logs:
            pl_module.log_dict(self.values, batch_size=1)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._undo()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._undo()

    # --- what they do ---

    def _targets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Target]:
        if self.name == _DROPOUT:
            return [self._own(_DROPOUT, p, partial(setattr, module, name)) for module, name, p in self._dropouts]
        if self.name == _CLIP:
            return [
                self._own(_CLIP, _bound(old), partial(_write_clip, *clip)) for clip in self._clips for old in clip[2:]
            ]
        return group_targets(trainer.optimizers, self.name, self._base)

    def _own(self, label: str, base: float, write: Callable[[float], None]) -> Target:
        return Target(label, base if self._base is None else self._base, write)

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
                f"HyperparameterSchedule(schedule={self.schedule!r}): {self.name} would be {value:g} at "
                f"{self._clock.interval} {position:g}; it must be in {interval}."
            ) from None

    def _undo(self) -> None:
        for module, name, p in self._dropouts:
            setattr(module, name, p)
        for holder, name, old in self._clips:
            if getattr(holder, name, None) is not None:  # Fuse may have taken its clip out already
                setattr(holder, name, old)
        self._dropouts, self._clips = [], []


def _range_of(name: str) -> str:
    if name == _DROPOUT:
        return "[0, 1]"
    if name == _CLIP:
        return "(0, inf)"
    return "[0, 1)" if name.split("[")[0] in _BELOW_ONE else "[0, inf)"


def _dropouts(pl_module: pl.LightningModule, base: float | None) -> Any:
    for module in pl_module.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            yield module, "p", module.p
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0:
            yield module, "dropout", float(module.dropout)


def _clips(trainer: pl.Trainer) -> Any:
    """Whatever holds a bound of the gradients: object, attribute, its value."""
    if trainer.gradient_clip_val:
        yield trainer, _CLIP, trainer.gradient_clip_val
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, OnePassOptimizer) and isinstance(optimizer.clip, ClipNorm | ClipValue):
            yield optimizer, "clip", optimizer.clip


def _show_average_decay(trainer: pl.Trainer) -> None:
    """Where the average has a pass of its own, its decay is no entry of the groups yet."""
    for averaging in trainer.callbacks:  # type: ignore[attr-defined]
        decay = averaging.scheduled_decay if isinstance(averaging, WeightAveraging) else None
        for optimizer in trainer.optimizers if decay is not None else ():
            for group in optimizer.param_groups:
                group.setdefault("average_decay", decay)


def _bound(old: Any) -> float:
    if isinstance(old, ClipNorm):
        return old.max_norm
    return old.max_value if isinstance(old, ClipValue) else float(old)


def _write_clip(holder: Any, name: str, old: Any, value: float) -> None:
    if isinstance(old, ClipNorm):
        setattr(holder, name, replace(old, max_norm=value))
    elif isinstance(old, ClipValue):
        setattr(holder, name, replace(old, max_value=value))
    else:
        setattr(holder, name, value)
