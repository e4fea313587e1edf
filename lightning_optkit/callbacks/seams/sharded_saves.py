# SPDX-License-Identifier: Apache-2.0
"""Has FSDP2 write its checkpoints beside their target, sealed, and load only whole ones.

Lightning writes and reads them past the CheckpointIO, so this overrides the strategy. The overrides stay with it, as
its CheckpointIO does: checkpoints are also written on an exception and after a fit.
"""

import os
import re
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_optkit.callbacks.seams.lightning_private import saves_shards, set_loaded_path
from lightning_optkit.callbacks.seams.overrides import override
from lightning_optkit.callbacks.seams.sealed_files import checksum_of, seal_file
from lightning_optkit.callbacks.seams.staged_paths import (
    naming,
    put_in_place,
    staged_folder,
    staged_path,
    sync,
    write_file,
)
from lightning_optkit.callbacks.seams.usable_checkpoints import check_file, needs_of
from lightning_optkit.callbacks.seams.whole_checkpoints import CHECKSUMS, SHARED_STATE, sweep_orphans, whole_checkpoint

__all__ = ["guard_shards"]

Parts = list[tuple[str, int, int]]  # name, length, checksum
Save = Callable[[dict[str, Any], Path, Any], None]
Load = Callable[..., dict[str, Any]]


def guard_shards(strategy: ModelParallelStrategy, falls_back: bool) -> None:
    """Overrides how this strategy saves and loads, once."""
    if "save_checkpoint" in vars(strategy):
        return
    override(strategy, "save_checkpoint", partial(_save, strategy, strategy.save_checkpoint))
    override(strategy, "load_checkpoint", partial(_load, strategy, strategy.load_checkpoint, falls_back))


def _load(
    strategy: ModelParallelStrategy,
    load: Load,
    falls_back: bool,
    checkpoint_path: str | os.PathLike[str],
    weights_only: bool | None = None,
) -> dict[str, Any]:
    path = whole_checkpoint(Path(strategy.broadcast(checkpoint_path)), falls_back, needs_of(strategy), weights_only)
    check_file(strategy, path, weights_only)
    assert strategy.lightning_module is not None
    set_loaded_path(strategy.lightning_module.trainer, path)  # sharded averages are read from it later
    return load(path, weights_only=weights_only)


def _save(
    strategy: ModelParallelStrategy,
    save: Save,
    checkpoint: dict[str, Any],
    filepath: str | os.PathLike[str],
    storage_options: Any | None = None,
) -> None:
    if not saves_shards(strategy) or storage_options is not None:
        save(checkpoint, Path(filepath), storage_options)
        return
    target, save_id, saved_at = strategy.broadcast((Path(filepath), uuid.uuid4().hex, time.time_ns()))
    staged = staged_path(target, save_id)
    with naming(target), ExitStack() as stack:
        _gathered(strategy, partial(_begin, strategy, stack, staged))
        parts = _gathered(strategy, partial(_save_parts, strategy, save, checkpoint, staged))
        _gathered(strategy, partial(_finish, strategy, staged, target, parts, save_id, saved_at))


def _begin(strategy: ModelParallelStrategy, stack: ExitStack, staged: Path) -> Parts:
    """The first process creates the folder before the others write into it."""
    if strategy.is_global_zero:
        staged.parent.mkdir(parents=True, exist_ok=True)
        sweep_orphans(staged.parent)
        stack.enter_context(staged_folder(staged))
    return []


def _save_parts(strategy: ModelParallelStrategy, save: Save, checkpoint: dict[str, Any], staged: Path) -> Parts:
    """Lightning's own save; the parts that this process wrote."""
    save(checkpoint, staged, None)
    names = [path.name for path in staged.iterdir() if path.name != SHARED_STATE]
    names = [name for name in names if _writer_of(name) == strategy.global_rank]
    parts = []
    for name in sorted(names):
        sync(staged / name)
        size = (staged / name).stat().st_size
        parts.append((name, size, checksum_of(staged / name, size)))
    return parts


def _writer_of(name: str) -> int:
    """The rank in the name of a file of torch.distributed.checkpoint; 0 for files of the whole checkpoint."""
    match = re.match(r"_{2}(\d+)_", name)
    return int(match[1]) if match else 0


def _finish(
    strategy: ModelParallelStrategy, staged: Path, target: Path, parts: Parts, save_id: str, saved_at: int
) -> Parts:
    """The first process writes the checksums, and renames the folder."""
    if strategy.is_global_zero:
        seal_file(staged / SHARED_STATE, save_id, saved_at)
        lines = "".join(f"{checksum:08x} {size} {name}\n" for name, size, checksum in parts)
        write_file(staged / CHECKSUMS, lambda file: file.write(lines.encode()), save_id, saved_at)
        put_in_place(staged, target)
    return []


def _gathered(strategy: ModelParallelStrategy, work: Callable[[], Parts]) -> Parts:
    """The parts of all processes; if one fails, all raise its error, so that none waits for it."""
    parts: Parts = []
    failed: tuple[int | None, str] | None = None
    try:
        parts = work()
    except Exception as error:
        failed = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
    results: list[Any] = [(parts, failed)] * strategy.world_size
    torch.distributed.all_gather_object(results, (parts, failed))
    for _, failure in results:
        if failure is not None:
            raise OSError(*failure)
    return [part for mine, _ in results for part in mine]
