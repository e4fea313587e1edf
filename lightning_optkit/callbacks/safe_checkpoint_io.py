# SPDX-License-Identifier: Apache-2.0
"""Writes checkpoints that are whole or not there, and loads none that is damaged."""

import pickle
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from lightning_optkit._checks import check_bools
from lightning_optkit.callbacks.seams.gathered_shards import gathered_shards, is_sharded
from lightning_optkit.callbacks.seams.lightning_packages import is_a, twins
from lightning_optkit.callbacks.seams.sealed_files import SealingFile
from lightning_optkit.callbacks.seams.sharded_saves import guard_shards
from lightning_optkit.callbacks.seams.staged_paths import naming, remove, write_file
from lightning_optkit.callbacks.seams.usable_checkpoints import check_of_lightning, needs_of
from lightning_optkit.callbacks.seams.whole_checkpoints import sweep_orphans, whole_checkpoint

__all__ = ["SafeCheckpointIO", "write_safely"]


class SafeCheckpointIO(TorchCheckpointIO):
    """A CheckpointIO plugin whose checkpoints survive kills, full disks and damage.

    A checkpoint is written beside its target, sealed with its time, length and checksum (CRC-32), brought to the disk
    and renamed, so the target is always the whole old or the whole new one. Lightning's own is written in the folder
    for temporary files and moved: on another file system, a kill leaves half a file. What a killed save leaves behind
    is removed by the next one in the same folder.

    On loading, the checksum is compared. If it differs, or a part is missing, the newest whole checkpoint in the same
    folder from which the run can go on is loaded instead, with a warning that names both. Files stay ordinary ones for
    `torch.load`. Files written by Lightning load as well; they are whole if the lengths and checksums of torch's
    archive are right. Sharded folders of FSDP2 are gathered for one process and DDP; torch unpickles their parts, so
    use those that you trust. Paths on other than local file systems ("s3://...") are left to Lightning.

    `ExactResume` uses this plugin unless another `CheckpointIO` is given. With it, sharded checkpoints of FSDP2
    (`ModelParallelStrategy`), which Lightning writes past any plugin, are written and checked in the same way: a folder
    is renamed when all parts are on the disk, and holds one checksum per part and one id of the save. The folder must
    be on a file system that all processes see. Without `ExactResume`, loading under FSDP2 is not checked.

    Args:
        falls_back: Whether to load the newest whole checkpoint in place of a damaged one; otherwise, raise an error
            that names it. Choose False to evaluate one particular checkpoint.

    Raises:
        OSError: if a checkpoint cannot be written; the one before is unchanged.
        RuntimeError: if a checkpoint is damaged, and no other is whole or `falls_back` is False.

    Example:
        >>> trainer = pl.Trainer(plugins=[SafeCheckpointIO()], logger=False)
    """

    def __init__(self, falls_back: bool = True) -> None:
        check_bools(type(self).__name__, falls_back=falls_back)
        self.falls_back = falls_back
        self._strategy: Strategy | None = None  # of the run that it serves, where `ExactResume` says so

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes a checkpoint; see the class."""
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        with naming(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            sweep_orphans(target.parent)
            write = partial(_write, checkpoint)
            write_file(target, write, uuid.uuid4().hex, time.time_ns(), replaces_folder=is_sharded(target))

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Loads a checkpoint; see the class. Every process calls it."""
        if _is_local(path):
            path = whole_checkpoint(Path(path), self.falls_back, needs_of(self._strategy), weights_only)
        if isinstance(path, Path) and path.is_dir():
            return gathered_shards(path, weights_only)
        try:
            loaded = super().load_checkpoint(path, map_location, weights_only)
        except (EOFError, pickle.UnpicklingError) as error:  # a file of torch before 1.6, which has no checksums
            if weights_only or str(error).startswith("Weights only load failed"):
                raise
            raise RuntimeError(
                f"{type(self).__name__}: {path} is damaged (what it holds cannot be read): restore a copy, give "
                "another ckpt_path, or none to begin anew."
            ) from error
        if self._strategy is not None:
            check_of_lightning(self._strategy, path, loaded)
        return loaded

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint; see the class."""
        if _is_local(path) and Path(path).is_dir() and not Path(path).is_symlink():
            remove(Path(path), uuid.uuid4().hex)
        else:
            super().remove_checkpoint(path)


def write_safely(trainer: pl.Trainer) -> None:
    """Gives the strategy of a run a `SafeCheckpointIO`, unless the user chose a CheckpointIO."""
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) in twins(TorchCheckpointIO):
        strategy.checkpoint_io = SafeCheckpointIO()
    if isinstance(strategy.checkpoint_io, SafeCheckpointIO):
        strategy.checkpoint_io._strategy = strategy
        if is_a(strategy, ModelParallelStrategy):
            guard_shards(strategy, strategy.checkpoint_io.falls_back)


def _write(checkpoint: dict[str, Any], file: SealingFile) -> None:
    torch.save(checkpoint, cast(IO[bytes], file))  # needs no more than `write` and `flush`


def _is_local(path: str | Path) -> bool:
    return "://" not in str(path)
