# SPDX-License-Identifier: Apache-2.0
"""What a name was meant to be that is not there; loads neither torch nor Lightning."""

import ast
import difflib
import inspect
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

__all__ = ["about_missing", "is_asked_by_import", "is_module", "near_names"]

_PACKAGE = Path(__file__).parent


def near_names(name: str, names: Iterable[str]) -> list[str]:
    """Public names that are spelled much like it, in whatever case; at most three.

    Example:
        >>> near_names("fuze", ["Fuse", "Report"])
        ['Fuse']
    """
    by_lower = {each.lower(): each for each in names if not each.startswith("_")}
    return [by_lower[each] for each in difflib.get_close_matches(name.lower(), by_lower, cutoff=0.7)]


def is_asked_by_import() -> bool:
    """Whether whoever called the caller is the import system, and no `getattr` or `hasattr` of the user."""
    frame = inspect.currentframe()
    asking = frame and frame.f_back and frame.f_back.f_back
    return asking is not None and asking.f_code.co_filename.startswith("<frozen importlib")


def is_module(name: str) -> bool:
    """Whether it is a module of this package that is yet to be imported, such as `cli`."""
    return find_spec(f"{__package__}.{name}") is not None


def about_missing(name: str, at_top: Iterable[str], said: str) -> str:
    """The sentence about an attribute of this package that is not there.

    Args:
        name: What was asked for.
        at_top: The attributes of the package.
        said: The sentence without what is near it.
    """
    top = {*at_top}
    below = {each: path for each, path in _in_modules().items() if each not in top}
    if name in below:
        return f"{said}. It is {below[name]}."
    near = near_names(name, top) or [below[each] for each in near_names(name, below)]
    return (
        f"{said}. Near it: {', '.join(near)}." if near else f"{said}. `optkit list WORD` finds names by what they do."
    )


def _in_modules() -> dict[str, str]:
    """How the public names of the modules are written after `import lightning_optkit as ok`, read from their source."""
    found: dict[str, str] = {}
    for file in sorted(_PACKAGE.glob("[a-z]*/__init__.py")):
        if file.parent.name == "cli":
            continue
        for statement in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
                names = ast.literal_eval(statement.value)
                found |= {each: f"ok.{file.parent.name}.{each}" for each in names}
    return found
