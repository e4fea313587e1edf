# SPDX-License-Identifier: Apache-2.0
"""A module of the user that cannot be imported, or is another one of the same name than was meant."""

import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NamedTuple

from jsonargparse import _util

from lightning_optkit.cli.users_folders import is_of_user, users_folders

__all__ = ["about_import", "about_taken", "class_paths_in", "first_errors"]


class _Failed(NamedTuple):
    error: Exception
    traceback: TracebackType | None


_FAILED: dict[str, _Failed] = {}  # by the names of modules, within `first_errors`


@contextmanager
def first_errors() -> Iterator[None]:
    """Within it, a module that fails for the parser is run once, and its error is kept for `about_import`.

    jsonargparse tries a module again for another class that a place may have, or from its package, and keeps the text
    of an error alone. What a module registers before it fails is there the second time, so that it fails by something
    else.
    """
    setattr(_util, "__import__", _import)  # noqa: B010  (`import_object` calls it; mypy knows no such attribute)
    try:
        yield
    finally:
        del _util.__dict__["__import__"]
        _FAILED.clear()


def _import(name: str, *, fromlist: Sequence[str]) -> ModuleType:
    """As Python's own, but the second time it raises what it raised before."""
    for each in (name, *(f"{name}.{part}" for part in fromlist)):
        if failed := _FAILED.get(each):
            raise failed.error.with_traceback(failed.traceback)
    try:
        return __import__(name, fromlist=fromlist)
    except Exception as error:
        # A package that looks for its names itself may say by an ImportError that it has none of this one.
        is_there = isinstance(error, ImportError) and error.name in (name, None) and name in sys.modules
        is_missing = isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}.")
        if not is_there and not is_missing:
            _FAILED[name] = _Failed(error, error.__traceback__)
        raise


def class_paths_in(message: str) -> list[str]:
    r"""The paths of classes in the value that a message of jsonargparse ends with, and those that it names.

    Example:
        >>> class_paths_in("Errors:\nGiven value: [Namespace(class_path='a.B'), {'class_path': 'c.D'}]")
        ['a.B', 'c.D']
    """
    found = re.findall(r"class_path'?(?:=|: ?| )'((?:\w+\.)+\w+)'", message)
    plain = re.findall(r"^ *Given value: ((?:[A-Za-z_]\w*\.)+[A-Za-z_]\w*)$", message, flags=re.M)
    return [*dict.fromkeys(found + plain)]


def about_import(class_path: str) -> str | None:
    """Why the parser could not import the module of a class, within `first_errors`.

    None if it could, and if there is none of that name.

    Args:
        class_path: As the file has it.
    """
    module = class_path.rpartition(".")[0]
    failed = _FAILED.get(module)
    if failed is None:
        return None
    file, line = _place(*failed)
    said = failed.error.msg if isinstance(failed.error, SyntaxError) else " ".join(str(failed.error).split())
    return f"{module} cannot be imported: {type(failed.error).__name__}: {said.rstrip('.')} ({file}, line {line})."


def _place(error: Exception, raised: TracebackType | None) -> tuple[str, int]:
    """Where the user's code has it: what an installed package raises is looked for in the line that imports it."""
    if isinstance(error, SyntaxError) and error.filename:
        return _short(error.filename), error.lineno or 0
    frames = [each for each in traceback.extract_tb(raised) if not each.filename.startswith("<frozen ")]
    own = [each for each in frames[1:] if is_of_user(each.filename)]
    last = (own or frames)[-1]
    return _short(last.filename), last.lineno or 0


def _short(file: str) -> str:
    """As seen from the folder of the user that has it."""
    folders = [folder for folder in users_folders() if Path(file).is_relative_to(folder)]
    return os.path.relpath(file, folders[0]) if folders else file


def about_taken(class_path: str) -> str:
    """Which of several modules of one name was taken, Python's own among them; empty where there is one alone.

    Args:
        class_path: Of a class that its module does not have.
    """
    name = class_path.partition(".")[0]
    module = sys.modules.get(name)
    if module is None:
        return ""
    file = getattr(module, "__file__", None)
    places = [os.path.dirname(file) if Path(file or "").name == "__init__.py" else file] if file else []
    places = places or [*getattr(module, "__path__", [])]
    others = [each for each in _named(name) if not any(os.path.samefile(each, place) for place in places)]
    taken = places[0] if places else "built in"
    if name in sys.stdlib_module_names or _is_pythons(taken):  # `test` is not among the names
        hidden = f"; {', '.join(others)} is hidden by it and needs another name" if others else ""
        return f"{name} is a module of Python itself ({taken}){hidden}."
    return f"Of the modules called {name}, {taken} was taken, not {', '.join(others)}." if others else ""


def _is_pythons(path: str) -> bool:
    return Path(path).is_relative_to(sysconfig.get_path("stdlib")) and "site-packages" not in Path(path).parts


def _named(name: str) -> Iterator[str]:
    """The files and packages of that name in the user's folders."""
    for folder in users_folders():
        for each in (Path(folder, name), Path(folder, f"{name}.py")):
            if each.is_file() or (each.is_dir() and next(each.glob("*.py"), None)):
                yield str(each)
