# SPDX-License-Identifier: Apache-2.0
"""Schedules any other hyperparameter of an unchanged run: weight decay, momentum, betas, dropout, ..."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_optkit._checks import check_bools, check_in, check_text
from lightning_optkit._torch_private import AnyDropout
from lightning_optkit.averaging import SWA, PowerEMA
from lightning_optkit.callbacks.elastic_net import ElasticNet
from lightning_optkit.callbacks.gradient_clipping import GradientClipping
from lightning_optkit.callbacks.scheduling.clock import Interval
from lightning_optkit.callbacks.scheduling.group_targets import entry_names, group_targets, keeper_of, normalized
from lightning_optkit.callbacks.scheduling.scheduled_callback import ScheduledCallback
from lightning_optkit.callbacks.scheduling.target import Target
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.lightning_private import key_of_state, logs_now
from lightning_optkit.callbacks.weight_averaging import WeightAveraging
from lightning_optkit.clipping import ClipNorm, ClipPerTensor, ClipValue
from lightning_optkit.layers import AddLayerNorm, AddRMSNorm, DropBlock2d, DropConnect, DropPath, LockedDropout
from lightning_optkit.schedules import Schedule
from lightning_optkit.step import OnePassOptimizer

__all__ = ["HyperparameterSchedule"]

_RANGES = {"dropout": "[0, 1]", "gradient_clip_val": "(0, inf)", "beta2_decay": "(-inf, 0]"}
_BELOW_ONE = {"betas", "adamw_betas", "momentum", "dampening", "average_decay", "rho"}


_WITH_P = (AnyDropout, DropBlock2d, DropConnect, DropPath, LockedDropout)
_WITH_DROPOUT = (nn.MultiheadAttention, nn.RNNBase, AddLayerNorm, AddRMSNorm)


@dataclass(frozen=True)
class _Outside:
    """A value outside the parameter groups.

    Args:
        value: Its value when the training started.
        write: Sets it.
        undo: Restores it.
    """

    value: float
    write: Callable[[float], None]
    undo: Callable[[], None]


class HyperparameterSchedule(ScheduledCallback):
    """Multiplies one hyperparameter by a schedule, in each group, counted as in `LRSchedule`.

    There may be several, one for each name. Values outside the optimizer (dropout, `gradient_clip_val`, a clip, the
    `l1` of `ElasticNet`) are restored after the fit. What else writes an entry (OneCycleLR the momentum) is overwritten
    at the next step, with a warning.

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
        self._outside: list[_Outside] = []

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
            raise ValueError(f"{self._call} {type(keeper).__name__} keeps it for itself; {known}.")
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._outside = list(_OUTSIDE_GROUPS[self.name](trainer, pl_module)) if self.name in _OUTSIDE_GROUPS else []
        for each in self._outside:
            self._at_end(each.undo)
        if self.name == "average_decay":
            self._refuse_averages_without_it(trainer)
            _show_average_decay(trainer)
        targets = self._targets(trainer, pl_module)
        if not targets:
            raise ValueError(f"{self._call} nothing here has it; {self._known(trainer, pl_module)}.")
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

    def _refuse_averages_without_it(self, trainer: pl.Trainer) -> None:
        """Their groups have the entry too, since a step reads it for every average."""
        without = [
            one.average
            for one in trainer.optimizers
            if isinstance(one, OnePassOptimizer) and isinstance(one.average, PowerEMA | SWA)
        ]
        decays = [callback.scheduled_decay for callback in callbacks_of(trainer, WeightAveraging)]
        if without and all(decay is None for decay in decays) and len(without) == len(trainer.optimizers):
            raise ValueError(f"{self._call} {without[0]!r} does not use it; schedule that of an EMA.")

    def _targets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Target]:
        outside = [Target(self.name, self._base_of(each), each.write) for each in self._outside]
        # An entry of a callback's own would be applied a second time by the optimizer.
        return [*group_targets(trainer.optimizers, self.name, None if outside else self._base), *outside]

    @staticmethod
    def _known(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        """The hyperparameters that can be scheduled, for a message."""
        outside = [name for name, found in _OUTSIDE_GROUPS.items() if any(True for _ in found(trainer, pl_module))]
        names = [name for name in dict.fromkeys([*entry_names(trainer.optimizers), *outside]) if name != "lr"]
        return f"there are {', '.join(names)}" if names else "this run has nothing that can be scheduled"

    def _base_of(self, outside: _Outside) -> float:
        return outside.value if self._base is None else self._base

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
        super()._forget()
        self._outside = []


def _range_of(name: str) -> str:
    return _RANGES.get(name) or ("[0, 1)" if name.split("[")[0] in _BELOW_ONE else "[0, inf)")


def _show_average_decay(trainer: pl.Trainer) -> None:
    """An average outside of the step has no decay entry in the groups yet."""
    for averaging in callbacks_of(trainer, WeightAveraging):
        decay = averaging.scheduled_decay
        for optimizer in trainer.optimizers if decay is not None else ():
            for group in optimizer.param_groups:
                group.setdefault("average_decay", decay)


def _attribute(holder: Any, name: str) -> _Outside:
    value = getattr(holder, name)
    return _Outside(float(value), partial(setattr, holder, name), partial(setattr, holder, name, value))


def _dropouts(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[_Outside]:
    for module in pl_module.modules():
        if isinstance(module, _WITH_P):
            yield _attribute(module, "p")
        elif isinstance(module, _WITH_DROPOUT) and module.dropout > 0:  # 0: no dropout is intended
            yield _attribute(module, "dropout")


def _clip_values(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[_Outside]:
    if trainer.gradient_clip_val:
        yield _attribute(trainer, "gradient_clip_val")
    clippings = callbacks_of(trainer, GradientClipping)
    for clipping in clippings:
        for place, clip in clipping.clips.items():
            if bound := _bound_of(clip):
                yield _of_clip(clip, bound, partial(clipping.replace_clip, place))
    for place, optimizer in enumerate(trainer.optimizers if not clippings else ()):
        if isinstance(optimizer, OnePassOptimizer) and (bound := _bound_of(optimizer.clip)):
            yield _of_clip(optimizer.clip, bound, partial(_set_clip, trainer, place))


def _l1(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[_Outside]:
    """For a proximal step in a separate pass; in a one-pass step, `l1` is an entry of the groups."""
    for callback in callbacks_of(trainer, ElasticNet):
        if callback._own["l1"]:
            yield _attribute(callback, "l1")


_OUTSIDE_GROUPS: dict[str, Callable[[pl.Trainer, pl.LightningModule], Iterator[_Outside]]] = {
    "dropout": _dropouts,
    "gradient_clip_val": _clip_values,
    "l1": _l1,
}


def _bound_of(clip: Any) -> str | None:
    """The field of a clip that corresponds to the Trainer's `gradient_clip_val`."""
    if isinstance(clip, ClipNorm | ClipPerTensor):
        return "max_norm"
    return "max_value" if isinstance(clip, ClipValue) else None


def _of_clip(clip: Any, bound: str, put: Callable[[Any], None]) -> _Outside:
    """Clips are immutable, so they are replaced."""
    return _Outside(getattr(clip, bound), lambda value: put(replace(clip, **{bound: value})), partial(put, clip))


def _set_clip(trainer: pl.Trainer, place: int, clip: Any) -> None:
    optimizer = trainer.optimizers[place] if place < len(trainer.optimizers) else None
    if isinstance(optimizer, OnePassOptimizer) and optimizer.clip is not None:  # Fuse may have removed it already
        optimizer.clip = clip
