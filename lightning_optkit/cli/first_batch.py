# SPDX-License-Identifier: Apache-2.0
"""`optkit explain` and `optkit find-lr`: a run up to its first batch, of which no step is taken."""

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningCLI
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_optkit._terminal import announce, fitted
from lightning_optkit.callbacks import Fuse, LRFinder, LRSchedule, PowerSnapshots, Report, SnapshotEnsemble
from lightning_optkit.callbacks._steps_at_rates import bases_of
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.callbacks.seams.unread_average import warn_of_unread_averages
from lightning_optkit.cli.suggested_rates import RatePlace, advice, rate_places
from lightning_optkit.diagnostics._rate_trials import TRAINED
from lightning_optkit.diagnostics.lr_range import LRRange
from lightning_optkit.optimizers.convert import why_not_convertible
from lightning_optkit.step import OnePassOptimizer

__all__ = ["explain", "find_lr"]

# Nothing of a run that takes no step should be left: no files, no log folder, no bar, no table in front of the answer.
_WRITE = (
    Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary, PowerSnapshots, ProgressBar, Report,
    SnapshotEnsemble,
)  # fmt: skip
_POINTS = 5  # of the run, at which rates are shown


class _Reached(Exception):
    """The first batch: nothing more is to be done."""


class _Stop(pl.Callback):
    """Looks at the run before the first batch, and ends it there."""

    def __init__(self, look: Any) -> None:
        self._look = look

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._look(trainer)
        raise _Reached


def explain(cli: LightningCLI) -> None:
    """Prints what the callbacks say when the training starts, each optimizer, and the rates over the run."""
    console = Console(highlight=False, markup=False)
    if not _start(cli, lambda trainer: _print_plan(console, trainer), drop=(LRFinder,)):
        raise ValueError("the run ends before its first batch, so there is no plan (max_epochs, limit_train_batches?).")


def find_lr(cli: LightningCLI) -> None:
    """Runs the range test of the configuration's `LRFinder`, or of a default one, and prints its suggestions.

    Raises:
        ValueError: without a suggestion, since a script would go on with no rate.
    """
    trainer: Any = cli.trainer
    finders = callbacks_of(trainer, LRFinder)
    finder = finders[0] if finders else LRFinder()
    finder.apply = finder.verbose = False
    finder.suggestion = cli.config["suggestion"] or finder.suggestion
    if not finders:
        trainer.callbacks.append(finder)
    more = f", then training for some {6 * finder.trial_steps:,} steps" if finder.suggestion == TRAINED else ""
    announce(f"Testing {finder.num_steps} rates, a step each{more} ...")
    places: list[RatePlace] = []
    present: list[str] = []

    def look(trainer: pl.Trainer) -> None:
        places.extend(rate_places(trainer))
        present.append(_present(trainer))

    _start(cli, look)
    if finder.result is None or not (places or finder.result.reason):
        raise ValueError("the fit ended before the test; nothing was tested.")
    if finder.result.reason:
        raise ValueError(f"no suggestion: {finder.result.reason}.")
    console = Console(highlight=False, markup=False)
    by = "asked for by --suggestion" if cli.config["suggestion"] else "the choice of LRFinder"
    _print_suggestions(console, finder.result, finder.suggestion, by)
    for sentence in present:
        console.print(sentence)
    console.print(advice(finder.result, finder.suggestion, places))


def _present(trainer: pl.Trainer) -> str:
    """What a suggestion would replace."""
    base = max(bases_of(trainer))
    first = max(float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)
    begins = "" if math.isclose(base, first, rel_tol=1e-5) else f"; its schedule begins at {first:.3g}"
    return f"The configuration has {base:.3g}{begins}."


def _start(cli: LightningCLI, look: Any, drop: tuple[type[pl.Callback], ...] = ()) -> bool:
    """Whether the first batch was reached."""
    trainer: Any = cli.trainer
    trainer.callbacks[:] = [
        callback for callback in trainer.callbacks if not isinstance(callback, (*_WRITE, *drop))
    ] + [_Stop(look)]
    trainer.num_sanity_val_steps, trainer.loggers = 0, []
    of_fit = {name: cli.config[name] for name in ("ckpt_path", "weights_only") if name in cli.config}
    try:
        trainer.fit(cli.model, datamodule=cli.datamodule, **of_fit)
    except _Reached:
        return True
    return False


def _print_plan(console: Console, trainer: pl.Trainer) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("optimizer", "groups", "parameters", "rate of the first step", "steps"):
        table.add_column(title, overflow="fold")
    for optimizer in trainer.optimizers:
        groups = optimizer.param_groups
        rates = sorted({f"{float(group['lr']):.3g}" for group in groups if "lr" in group}, key=float)
        size = sum(param.numel() for group in groups for param in group["params"])
        how = "one pass" if isinstance(optimizer, OnePassOptimizer) else "as it is"
        name = optimizer._owner if isinstance(optimizer, OnePassOptimizer) else type(optimizer).__name__
        table.add_row(name, str(len(groups)), f"{size:,}", ", ".join(rates), how)
    console.print(table)
    as_it_is = [each for each in trainer.optimizers if not isinstance(each, OnePassOptimizer)]
    fuses = callbacks_of(trainer, Fuse)
    if as_it_is:
        helps = not fuses and any(why_not_convertible(optimizer) is None for optimizer in as_it_is)
        remedy = "; Fuse makes them one pass" if helps else ""
        console.print(f"Steps as it is: by the optimizer's own code, clipping and averages beside it{remedy}.")
    warn_of_unread_averages(trainer)  # no callback may have looked
    if not any(fuse._verbose for fuse in fuses):  # which prints the plans of all
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, OnePassOptimizer):
                console.print(fitted(str(optimizer.explain())))
    steps = Run(trainer).steps_at_end()
    console.print(f"Run: {'of unknown length' if steps is None else f'{steps:,.0f} optimizer steps'}.")
    for callback in callbacks_of(trainer, LRSchedule):
        _print_rates(console, callback, trainer)


def _print_rates(console: Console, callback: LRSchedule, trainer: pl.Trainer) -> None:
    total = callback._clock.total
    if total is None:
        return
    base = max(float(group["initial_lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)
    console.print(f"LRSchedule({callback.schedule!r}):")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(callback._clock.interval, justify="right")
    table.add_column("rate", justify="right")
    for point in range(_POINTS):
        at = min(total * point / (_POINTS - 1), total - 1)
        table.add_row(f"{at:,.0f}", f"{base * callback.schedule(at, total):.3g}")
    console.print(table)


def _print_suggestions(console: Console, found: LRRange, chosen: str, by: str) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("rule", "rate"):
        table.add_column(title)
    for name, rate in found.suggestions.items():
        table.add_row(f"{name}, {by}" if name == chosen else name, "" if rate is None else f"{rate:.3g}")
    console.print(table)
    console.print(f"Tested {len(found.lrs)} rates from {found.lrs[0]:.3g} to {found.lrs[-1]:.3g}.")
