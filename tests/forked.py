# SPDX-License-Identifier: Apache-2.0
"""Forks the processes of a run from one that has imported everything, which takes a fraction of a second.

For scripts of one thread: a process that has started threads must not be forked, so tests start such a script.
"""

import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from workers import free_port

import lightning_optkit as ok

QUIET = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
IMPORTED = [getattr(ok, name) for name in ok.__all__]  # else each process imports what its run comes by
KINDS = {"one": 1, "ddp": 2, "fsdp full": 2, "fsdp sharded": 2}  # the number of processes


class Ended(NamedTuple):
    """How a process ended: with a value, an error (its traceback), or by a signal or the time limit (neither)."""

    value: Any = None
    error: str = ""


def strategy_of(kind: str, world: int, timeout: float = 60.0) -> dict[str, Any]:
    """Arguments of a Trainer for so many processes."""
    wait = timedelta(seconds=timeout)
    if kind == "one":
        return dict(devices=1)
    if kind == "ddp":
        return dict(devices=world, strategy=DDPStrategy(process_group_backend="gloo", timeout=wait))
    strategy = ModelParallelStrategy(
        data_parallel_size=world,
        tensor_parallel_size=1,
        save_distributed_checkpoint=kind == "fsdp sharded",
        process_group_backend="gloo",
        timeout=wait,
    )
    return dict(devices=world, strategy=strategy)


def start(function: Callable[[], Any], world: int, waits: bool = True) -> tuple[list[int], Path]:
    """Starts the processes, each in a group of its own; their ids, and the folder of their results.

    Args:
        function: Called in each process.
        world: Number of processes.
        waits: Whether a process waits for the others after it; False if one of them is expected to fail.
    """
    port = free_port()
    folder, pids = Path(tempfile.mkdtemp()), []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            os.setpgid(0, 0)
            _run(function, rank, world, port, folder, waits)
        pids.append(pid)
    return pids, folder


def _run(function: Callable[[], Any], rank: int, world: int, port: int, folder: Path, waits: bool) -> None:
    names = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
    for name, value in zip(names, ("127.0.0.1", port, 0, rank, world), strict=True):
        os.environ.pop(name, None) if world == 1 else os.environ.update({name: str(value)})
    sink = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(sink, 1), os.dup2(sink, 2)
    try:
        ended = Ended(function())
    except BaseException as error:
        ended = Ended(error=f"{''.join(traceback.format_tb(error.__traceback__)[-4:])}{type(error).__name__}: {error}")
    torch.save(tuple(ended), folder / f"{rank}.new")
    (folder / f"{rank}.new").rename(folder / f"{rank}.pt")
    if waits and not ended.error and torch.distributed.is_initialized():
        torch.distributed.barrier()  # the others may still need this one
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run


def finish(pids: list[int], folder: Path, limit: float = 60.0) -> list[Ended]:
    """Waits for the processes, kills those that take longer, and returns how each ended."""
    end, left = time.monotonic() + limit, [*pids]
    while left and time.monotonic() < end:
        left = [pid for pid in left if os.waitpid(pid, os.WNOHANG)[0] == 0]
        time.sleep(0.005)
    for pid in left:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    paths = [folder / f"{rank}.pt" for rank in range(len(pids))]
    ended = [Ended(*torch.load(path, weights_only=False)) if path.exists() else Ended() for path in paths]
    shutil.rmtree(folder)
    return ended


def values(function: Callable[[], Any], world: int, limit: float = 60.0) -> list[Any]:
    """What the function returns in each of so many processes.

    Raises:
        RuntimeError: if one fails or takes longer than the limit.
    """
    ended = finish(*start(function, world), limit)
    if failed := [each for each in ended if each.error or each.value is None]:
        raise RuntimeError(failed[0].error or "a process was killed, or returned nothing")
    return [each.value for each in ended]
