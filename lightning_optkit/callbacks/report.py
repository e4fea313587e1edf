# SPDX-License-Identifier: Apache-2.0
"""Records a fit and writes it as one HTML file."""

import statistics
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit._checks import check_bools, check_int, check_text
from lightning_optkit._terminal import width
from lightning_optkit.callbacks._gradient_norms import GradientNorms
from lightning_optkit.callbacks._page_of_run import PageOfRun
from lightning_optkit.callbacks._pending_values import PendingValues, curve_of
from lightning_optkit.callbacks._plan_of_run import clip_of_run, plan_of_run
from lightning_optkit.callbacks.gradient_health import GradientHealth
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.interruption import how_it_ended
from lightning_optkit.callbacks.seams.layers_of_run import LayersOfRun
from lightning_optkit.callbacks.seams.lightning_private import logged_in_training_step, logged_per_epoch
from lightning_optkit.callbacks.seams.optimizer_names import optimizer_names
from lightning_optkit.callbacks.seams.refusals import refuse_listed_twice
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.callbacks.seams.run_settings import callback_arguments, run_settings, watched_metrics
from lightning_optkit.callbacks.seams.steps import StepListener, watch_steps
from lightning_optkit.diagnostics._record import record_from
from lightning_optkit.diagnostics._summary import summary_text
from lightning_optkit.diagnostics.environment import environment
from lightning_optkit.diagnostics.report import RunRecord

__all__ = ["Report"]


class Report(FitCallback):
    """Records a fit and writes it as one page when the fit ends: settings, curves, layers, the plan, findings.

    A fit that is ended by an exception, Ctrl-C or SIGTERM after at least one step is written too, and the page begins
    with what ended it, when and where. With several processes, that is what ended the first one; if another one
    fails alone, Lightning's launcher kills the first, and there is no page. No file is written for `fast_dev_run`, like
    those of Lightning's loggers and checkpoints, and for a fit without a step.

    The page needs nothing but itself. A file of the same name that ends in .json holds the record, from which
    `optkit report` puts several runs on one page. Steps are counted as in a schedule: with manual optimization, a batch
    is a step. Loss and gradients are those of rank zero; under DDP the gradients are the same on every rank. Values on
    an accelerator are fetched together, a few hundred at a time. The record is saved in every checkpoint, so a resumed
    run's report covers the whole run.

    Args:
        path: The file to write, which ends in .html. Default: report.html in the logger's folder, or in the trainer's
            `default_root_dir`.
        name: Name of the run in the report. Default: the class of the module.
        measure_every: Steps between measurements of the gradient norm, at least 1; not used if the step provides it.
        write: False only records: pass the `record` of several runs to `diagnostics.write_report` to compare them.
        layers: Also measure gradients, updates and outputs of every layer, in the first steps, then at most each
            `measure_every`-th, and more rarely as the run goes on: about 250 times in 100,000 steps.
        verbose: Print a summary when the fit ends.

    Raises:
        ValueError: for an argument out of range, and a path that is a folder or has another end.

    Cost: no pass over the gradients with `Fuse` and a clip by norm; otherwise two in `measure_every` steps. A step
    whose layers are measured costs what one of `GradientHealth` does.

    Example:
        >>> trainer = pl.Trainer(callbacks=[Report("report.html")], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        path: str | Path | None = None,
        name: str | None = None,
        measure_every: int = 10,
        write: bool = True,
        layers: bool = True,
        verbose: bool = True,
    ) -> None:
        check_int(type(self).__name__, "measure_every", measure_every, minimum=1)
        check_bools(type(self).__name__, write=write, layers=layers, verbose=verbose)
        if name is not None:
            check_text(type(self).__name__, "name", name, 'a name of the run, such as "plain"')
        self._page = PageOfRun(type(self).__name__, path)
        self._name, self._measure_every, self._write = name, measure_every, write
        self._layers, self._verbose = layers, verbose
        self.record = RunRecord(name or "run")
        self._forget()

    def _forget(self) -> None:
        self._values = PendingValues()
        self._losses: list[Tensor] = []  # of the batches accumulated for the next step
        self._not_validation: set[str] = set()
        self._names: dict[Optimizer, str] = {}
        self._started: float | None = None
        self._batch_idx, self._origin = 0, 0.0
        self._norms: GradientNorms | None = None
        self._of_layers: LayersOfRun | None = None
        self._page.folder = None

    def __getstate__(self) -> dict[str, Any]:
        self._values.fetch()  # fetched here, since a copy would append to the same record
        return super().__getstate__()

    def state_dict(self) -> dict[str, Any]:
        """The record so far, in plain types."""
        self._values.fetch()
        return self.record.to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the record."""
        self.record = record_from(state_dict, f"{type(self).__name__}.load_state_dict(state_dict")

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_listed_twice(self, trainer)
            self._forget()
            self.record = RunRecord(self._name or type(pl_module).__name__)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def joins(optimizer: Optimizer, place: int) -> None:
            self._names = dict(zip(trainer.optimizers, optimizer_names(trainer), strict=True))

        def counts(optimizer: Optimizer, place: int) -> None:
            self._after_step(trainer, optimizer)

        self._at_end(watch_steps(trainer, StepListener(type(self).__name__, joins=joins, counts=counts)).remove)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        record = self.record
        record.ended = {}
        self._page.folder = _folder_of(trainer)  # not asked after an exception, since it asks the other processes
        self._norms = GradientNorms(trainer, record, self._values, self._measure_every)
        record.num_steps = Run(trainer).step
        date = record.settings.get("date") or f"{datetime.now():%Y-%m-%d %H:%M}"
        record.settings = {"date": date, **run_settings(trainer, pl_module)}
        record.callbacks, record.goals = callback_arguments(trainer, but=self), watched_metrics(trainer)
        record.environment = environment()
        if self._writes(trainer):
            self._page.warn_if_unwritable()
        self._origin = time.perf_counter() - (record.elapsed_s.last or 0.0)
        if self._layers:
            self._of_layers = LayersOfRun(trainer, pl_module, record.layers, self._measure_every)
            self._at_end(self._of_layers.close)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not earlier: only now is it known what every callback adds to the step.
        self.record.explanation = plan_of_run(trainer)
        self.record.clip = clip_of_run(trainer)
        self._started = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_idx = batch_idx
        if self._started is None:
            self._started = time.perf_counter()
        if self._of_layers is not None:
            self._of_layers.before_batch(Run(trainer).step)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._norms is not None:
            self._norms.after_backward(trainer, self._names, self._batch_idx)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            divided_by = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._losses.append(loss.detach() if divided_by == 1 else loss.detach() * divided_by)
        step = Run(trainer).step
        if step == self.record.num_steps:
            return
        self.record.num_steps = step
        if self._losses:
            mean = self._losses[0] if len(self._losses) == 1 else torch.stack(self._losses).mean()
            self._values.append(self.record.loss, step, mean)
        self._losses = []
        for name, value in logged_in_training_step(trainer).items():
            self._values.append(curve_of(self.record.logged, name), step, value)
        if self._of_layers is not None:
            self._of_layers.after_batch(step)
        now = time.perf_counter()
        if self._started is not None:
            self.record.step_ms.append(step, 1e3 * (now - self._started))
        self.record.elapsed_s.append(step, now - self._origin)
        self._started = now

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        known = self.record.metrics
        self._not_validation |= {name for name in trainer.callback_metrics if name not in known}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = None  # the time of the validation is not part of a step
        if trainer.sanity_checking or self._page.folder is None:  # a validation outside of a fit
            return
        for name, value in trainer.callback_metrics.items():
            if name not in self._not_validation:
                curve_of(self.record.metrics, name).append(Run(trainer).step, float(value))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name in logged_per_epoch(trainer):
            value = trainer.callback_metrics.get(name)
            if value is not None and value.numel() == 1:
                curve_of(self.record.logged, name).append(Run(trainer).step, float(value))
        self._values.fetch()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._values.fetch()
        self._page.folder = _folder_of(trainer)
        self._conclude(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # No error of ours may take the place of the user's.
        try:
            if self._page.folder is not None:
                self._conclude_early(trainer, pl_module, exception)
        except Exception as error:
            self._page.say_unwritten(error)
        super().on_exception(trainer, pl_module, exception)

    # --- implementation ---

    def _conclude_early(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        for health in callbacks_of(trainer, GradientHealth):
            health.conclude_early(trainer, pl_module)
        try:
            self._values.fetch()
        except RuntimeError:  # of a device that has failed
            self._values.drop()
        self.record.ended = how_it_ended(trainer, exception)
        self.record.num_steps = Run(trainer).step
        self._conclude(trainer)

    def _conclude(self, trainer: pl.Trainer) -> None:
        """Sums the record up and writes it. Calls no other process."""
        record = self.record
        _, durations = record.step_ms.finite()
        if durations:
            record.timings["training step"] = statistics.median(durations)
        health = callbacks_of(trainer, GradientHealth)
        record.verdicts = [verdict for each in health for verdict in each.verdicts] if health else None
        has_something = record.num_steps > 0 or record.verdicts  # else it would replace the page of another run
        if self._verbose and has_something:
            rank_zero_info(summary_text(record, width()))
        if self._writes(trainer) and has_something:
            self._page.write(record)

    def _writes(self, trainer: Any) -> bool:
        return self._write and trainer.is_global_zero and not trainer.fast_dev_run

    def _after_step(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        step, name = Run(trainer).step + 1, self._names[optimizer]
        groups = optimizer.param_groups
        for group_index, group in enumerate(groups):
            label = str(group.get("name", f"group {group_index}"))
            if len(trainer.optimizers) > 1:
                label = f"{name}, {label}" if len(groups) > 1 else name
            self._values.append(curve_of(self.record.learning_rate, label), step, group["lr"])
        if self._norms is not None:
            self._norms.after_step(trainer, optimizer, name, step)
        if self._of_layers is not None:
            self._of_layers.after_step(optimizer)

    def _release(self) -> None:
        """Fetches what is still on an accelerator, since the record can be read after the fit."""
        self._values.fetch()
        self._forget()


def _folder_of(trainer: pl.Trainer) -> str:
    return trainer.log_dir or trainer.default_root_dir
