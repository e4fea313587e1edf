# SPDX-License-Identifier: Apache-2.0
"""Scripts that the tests of several processes start, and whose cases they also run alone."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

_OF_A_LAUNCH = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT", "PL_GLOBAL_SEED")


def load_worker(path: Path) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(path: Path, folder: Path, *cases: str, timeout: float) -> None:
    """Runs the script, which starts the other processes and saves into `folder`, on one core for each."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCH}
    done = subprocess.run(
        [sys.executable, str(path), str(folder), *cases],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
