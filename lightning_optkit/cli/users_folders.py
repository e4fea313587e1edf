# SPDX-License-Identifier: Apache-2.0
"""Where the modules that a configuration names are looked up: the current folder, then those of the files."""

import os
import site
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

__all__ = ["add_users_folders", "is_of_user", "users_folders"]

_OF_PYTHON = ("stdlib", "platstdlib", "purelib", "platlib", "scripts")


def add_users_folders(files: Iterable[str]) -> None:
    """Puts the current folder in front of `sys.path`, as `python -m` does, and those of the files at its end.

    They are absolute, since jsonargparse reads a file from within the folder of the file. Of a file that is a link,
    both the folder of the link and that of what it leads to count.

    Args:
        files: Paths of configurations.
    """
    current = str(Path.cwd())
    if sys.path[:1] != [current]:
        sys.path.insert(0, current)
    for file in files:
        for path in (os.path.abspath(file), os.path.realpath(file)):
            folder = os.path.dirname(path)
            if folder not in sys.path and Path(folder).is_dir():
                sys.path.append(folder)  # at the end: a file beside a configuration hides no package


def users_folders() -> list[str]:
    """Those of `sys.path` that are neither Python's own nor those of installed packages."""
    return [
        each
        for each in dict.fromkeys(str(Path(each).absolute()) for each in sys.path)
        if Path(each).is_dir() and not _is_installed(each)
    ]


def is_of_user(file: str) -> bool:
    """Whether it is in one of `users_folders`, and in no environment that lies within one."""
    return not _is_installed(file) and any(Path(file).is_relative_to(folder) for folder in users_folders())


def _is_installed(path: str) -> bool:
    paths = sysconfig.get_paths()
    own = [*(paths[each] for each in _OF_PYTHON), *site.getsitepackages(), site.getusersitepackages()]
    return any(Path(path).is_relative_to(folder) for folder in own)
