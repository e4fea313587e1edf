# SPDX-License-Identifier: Apache-2.0
"""Scripts that the tests of several processes start, and whose cases they also run alone."""

import importlib.util
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from unittest import mock

_OF_A_LAUNCH = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT", "PL_GLOBAL_SEED")
# It imports everything once, which takes seconds, and forks the scripts.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["forked"])


def load_worker(path: Path) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(path: Path, *arguments: object, processes: int = 1, timeout: float) -> None:
    """Runs the script in so many processes, each on one core; a single one may start others itself."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCH}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment["OMP_NUM_THREADS"] = "1"
    ranks = _ranks(processes) if processes > 1 else [{}]
    started, end = [], time.monotonic() + timeout
    with tempfile.NamedTemporaryFile() as said, mock.patch.dict(os.environ, environment, clear=True):
        for rank in ranks:
            words = [str(path), *map(str, arguments)]
            started.append(_SERVER.Process(target=_run, args=(words, environment | rank, said.name)))
            started[-1].start()
        for process in started:
            process.join(max(end - time.monotonic(), 0.0))
            process.kill()
            process.join()
        assert [process.exitcode for process in started] == [0] * processes, Path(said.name).read_text()


def free_port() -> int:
    """A port of this machine at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _ranks(processes: int) -> list[dict[str, str]]:
    """The variables by which each process finds the others."""
    port = str(free_port())
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "WORLD_SIZE": str(processes)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _run(arguments: list[str], environment: dict[str, str], said: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sink = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(sink, 1), os.dup2(sink, 2)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")
