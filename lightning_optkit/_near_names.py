# SPDX-License-Identifier: Apache-2.0
"""What a name was meant to be that is not there; loads neither torch nor Lightning."""

import ast
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from lightning_optkit._names_elsewhere import NAMES_ELSEWHERE

__all__ = ["near_names", "refuse_name", "refusing_names"]

_PACKAGE = Path(__file__).parent
_SHORT = 4  # letters: two that changed places are a third of three


def near_names(name: str, names: Iterable[str]) -> list[str]:
    """Public names that are spelled much like it, in whatever case; at most three.

    Example:
        >>> near_names("fuze", ["Fuse", "Report"]), near_names("fti", ["fit", "find-lr"])
        (['Fuse'], ['fit'])
    """
    by_lower = {each.lower(): each for each in names if not each.startswith("_")}
    near = difflib.get_close_matches(name.lower(), by_lower, cutoff=0.7)
    if not near and len(name) <= _SHORT:
        near = difflib.get_close_matches(name.lower(), by_lower, cutoff=0.65)
    return [by_lower[each] for each in near]


def refusing_names(package: str, names: Iterable[str]) -> Callable[[str], Any]:
    """The `__getattr__` of a folder, which is asked for what the folder does not have.

    A type checker would take every name for one that there is, so it must not see it.

    Args:
        package: The folder, `__name__`.
        names: Its `__all__`.
    """

    def __getattr__(name: str) -> NoReturn:
        refuse_name(name, package, names)

    return __getattr__


def refuse_name(name: str, package: str, names: Iterable[str]) -> NoReturn:
    """Raises what Python would, with the names that are near; called by a `__getattr__`.

    Raises:
        AttributeError: where an attribute is asked for.
        ImportError: in `from package import name`, which would make one without the near names of an AttributeError.
    """
    said = f"module '{package}' has no attribute '{name}'"
    if (
        name.startswith("_") or not name.isidentifier() or find_spec(f"{package}.{name}") is not None
    ):  # a file that is yet to be imported
        raise AttributeError(said, name=name)
    frame = inspect.currentframe()
    asking = frame and frame.f_back and frame.f_back.f_back
    if asking is not None and asking.f_code.co_filename.startswith("<frozen importlib"):
        raise ImportError(_about(name, names, f"cannot import name '{name}' from '{package}'"), name=package)
    raise AttributeError(_about(name, names, said), name=name)  # with a name Python adds no names of its own


def _about(name: str, names: Iterable[str], said: str) -> str:
    """The sentence with what was meant: elsewhere in this package, named so in another one, or spelled otherwise."""
    here = {*names}
    below = {each: path for each, path in _in_modules().items() if each not in here}
    if place := below.get(name) or NAMES_ELSEWHERE.get(name) or NAMES_ELSEWHERE.get(f"{name}_"):  # kaiming_normal
        return f"{said}. It is {place}."
    short = [each for each in here if "_" in each and "".join(word[:1] for word in each.split("_")) == name]
    near = near_names(name, here) or short or [below[each] for each in near_names(name, below)]
    return (
        f"{said}. Near it: {', '.join(near)}." if near else f"{said}. `optkit list WORD` finds names by what they do."
    )


@functools.cache
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
