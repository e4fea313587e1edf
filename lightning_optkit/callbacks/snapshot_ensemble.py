# SPDX-License-Identifier: Apache-2.0
"""An ensemble from one run: a checkpoint at the end of every learning rate cycle.

Source: Huang et al. 2017, "Snapshot Ensembles: Train 1, Get M for Free", arXiv:1704.00109, section 3.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_optkit._checks import check_bools, check_in, check_int, check_path, check_state, shown
from lightning_optkit.callbacks.seams.refusals import refuse_listed_twice
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.callbacks.seams.run_free import RunFree
from lightning_optkit.schedules.schedule import Length, Schedule, check_length, resolve_length

__all__ = ["SnapshotEnsemble"]


class SnapshotEnsemble(RunFree, Callback):
    """Saves an ordinary checkpoint at the end of every cycle of a schedule with warm restarts, where the loss is low.

    Predict with all of them, or the last few, by `ensemble_predict(module, ensemble.paths, loader)`, or search for a
    better mean with `greedy_soup(ensemble.paths, score)`. With `WeightAveraging` each contains the average.

    The schedule itself is set by `LRSchedule(sgdr(...))`; pass the same object to this callback. A warmup before it
    takes `start` steps. List this callback after those whose state a snapshot should contain.

    Args:
        cycle: The schedule, `schedules.sgdr(...)`; or the length of its first cycle: an int >= 1 (optimizer steps) or
            a float in (0, 1] (fraction of the run after `start`).
        dirpath: Folder of the files; None: "snapshots" next to the logs of the run.
        cycle_mult: Ratio of the length of each cycle to the previous one, in [1, inf); a schedule has its own.
        start: Optimizer steps before the first cycle, at least 0.
        save_weights_only: Omit the state that is needed only to continue training.

    Raises:
        ValueError: for an argument out of range; when the training starts, if the first cycle is longer than the run.

    Example:
        >>> from lightning_optkit.schedules import sgdr
        >>> ensemble = SnapshotEnsemble(sgdr(cycle=1 / 5))
        >>> trainer = pl.Trainer(callbacks=[ensemble], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        cycle: Schedule | Length,
        dirpath: str | Path | None = None,
        cycle_mult: float = 1.0,
        start: int = 0,
        save_weights_only: bool = False,
    ) -> None:
        check_in(type(self).__name__, "cycle_mult", cycle_mult, "[1, inf)")
        check_int(type(self).__name__, "start", start, minimum=0)
        check_bools(type(self).__name__, save_weights_only=save_weights_only)
        if dirpath is not None:
            check_path(type(self).__name__, "dirpath", dirpath)
        if isinstance(cycle, Schedule):
            if cycle.name != "sgdr":
                raise ValueError(
                    f"{type(self).__name__}(cycle={shown(cycle)}): cycle must be schedules.sgdr(...) or the length of "
                    "its first cycle; what comes before it is counted by start."
                )
            if cycle_mult != 1.0:
                raise ValueError(f"{type(self).__name__}(cycle_mult={cycle_mult!r}): the schedule has its own.")
            arguments = dict(cycle.arguments)
            length, cycle_mult = arguments["cycle"], arguments["cycle_mult"]
        else:
            length = cycle
        self._cycle: Length = check_length(type(self).__name__, "cycle", length)
        self._cycle_mult, self._start = cycle_mult, start
        self._dirpath, self._save_weights_only = dirpath, save_weights_only
        self._ends: Iterator[int] = iter(())
        self._next_end: float = 0
        self._is_idle = False  # in a trial run that is too short
        self.paths: list[str] = []
        """Files of the snapshots, oldest first."""

    def state_dict(self) -> dict[str, Any]:
        """The files so far."""
        return {"paths": list(self.paths)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the list of files."""
        paths = check_state(type(self).__name__, state_dict, paths=list)["paths"]
        self.paths = [
            str(check_path(f"{type(self).__name__}.load_state_dict", "state_dict['paths']", p)) for p in paths
        ]

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_listed_twice(self, trainer)
            self.paths, self._is_idle = [], False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._plan(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(self._cycle, float):  # the loader of this epoch may have another length
            self._plan(trainer, Run(trainer).step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = Run(trainer).step
        if step < self._next_end:
            return
        name = f"snapshot-{len(self.paths) + 1}-step={trainer.global_step}.ckpt"
        path = trainer.strategy.broadcast(str(self._folder(trainer) / name))
        self.paths.append(path)
        trainer.save_checkpoint(path, weights_only=self._save_weights_only)
        self._next_end = next(end for end in self._ends if end > step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_idle:
            return
        if not self.paths or f"step={trainer.global_step}." not in self.paths[-1]:
            rank_zero_warn(
                f"{type(self).__name__}(cycle={self._cycle!r}): the run ended at step {trainer.global_step}, inside a "
                f"cycle that ends at {self._next_end}; there are {len(self.paths)} snapshots."
            )

    # --- implementation ---

    def _plan(self, trainer: pl.Trainer, before_epoch: int | None = None) -> None:
        try:
            self._look_ahead(Run(trainer), before_epoch)
        except ValueError:
            if not Run(trainer).is_trial:
                raise
            self._is_idle, self._next_end = True, math.inf
            rank_zero_info(f"{type(self).__name__}: this run of {Run(trainer).steps_at_end()} steps has no cycle.")

    def _look_ahead(self, run: Run, before_epoch: int | None = None) -> None:
        total = run.steps_at_end(before_epoch)
        length = None if total is None else total - self._start
        if length is not None and length <= 0:
            raise ValueError(
                f"{type(self).__name__}(start={self._start}): start must be less than the run, of {total} steps."
            )
        self._ends = _ends(
            self._start, resolve_length(type(self).__name__, "cycle", self._cycle, length), self._cycle_mult
        )
        self._next_end = next(end for end in self._ends if end > run.step)

    def _forget(self) -> None:
        self._ends = iter(())

    def _folder(self, trainer: pl.Trainer) -> Path:
        if self._dirpath is not None:
            return Path(self._dirpath)
        return Path(trainer.log_dir or trainer.default_root_dir) / "snapshots"


def _ends(start: float, length: float, mult: float) -> Iterator[int]:
    """Step counts at which the schedule, evaluated before each step, is about to restart."""
    end = float(start)
    while True:
        end += length
        length *= mult
        yield math.ceil(round(end, 6))
