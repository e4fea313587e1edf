# SPDX-License-Identifier: Apache-2.0
"""Errors of what only watches a run: each is said once, and the run goes on.

Only computations of this package stand in a guard, never a call of the user's code: its errors are the user's. A
warning is what is left of an error of ours, so where warnings are errors, as in the tests, it still ends the run.
"""

import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

from lightning_optkit._checks import shown

__all__ = ["Guard", "Guarding", "unguarded"]

Guarding = Callable[[str], AbstractContextManager[None]]  # of the part that stands in it, in words

_PACKAGE = Path(__file__).parents[1]


class Guard:
    """Passes over parts that fail.

    Args:
        owner: Who says so.
        advice: What can be done, in the imperative.
        is_silent: Whether failures are kept until `tell`.

    Example:
        >>> guard = Guard("Watch", "leave Watch out", is_silent=True)
        >>> with guard("the rule of three"):
        ...     1 / 0
        >>> guard.failed
        {'the rule of three': "ZeroDivisionError: 'division by zero'"}
    """

    def __init__(self, owner: str, advice: str, is_silent: bool = False) -> None:
        self._owner, self._advice, self._is_silent = owner, advice, is_silent
        self.is_muted = False
        self.failed: dict[str, str] = {}  # the first error of each part, in words

    def __call__(self, part: str) -> AbstractContextManager[None, bool]:
        """What stands in this context may fail; it is tried again the next time."""
        return _Part(self, part)

    def begin(self) -> None:
        """Forgets what failed, for another run."""
        self.failed, self.is_muted = {}, False

    def mute(self) -> None:
        """Says nothing until `begin`: once a run fails, ours may fail of the same."""
        self.is_muted = True

    def take(self, part: str, error: Exception) -> None:
        """Says that a part failed, unless it has been said."""
        if self.is_muted or part in self.failed:
            return
        text = f": {shown(str(error))}" if str(error) else ""
        self.failed[part] = f"{type(error).__name__}{text}{_place_of(error)}"
        if not self._is_silent:
            warnings.warn(self._sentence(part), stacklevel=3)

    def tell(self) -> None:
        """Says of all parts that failed silently."""
        for part in self.failed:
            warnings.warn(self._sentence(part), stacklevel=2)

    def _sentence(self, part: str) -> str:
        return (
            f"{self._owner}: {part} failed and is left out, the rest goes on ({self.failed[part]}); please report this "
            f"error of lightning_optkit, or {self._advice}."
        )


class _Part:
    # A class, since a generator would take several times as long, in each step.
    def __init__(self, guard: Guard, part: str) -> None:
        self._guard, self._part = guard, part

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self._guard.take(self._part, error)
        return True


def unguarded(part: str) -> AbstractContextManager[None]:
    """A guard that lets every error through."""
    return nullcontext()


def _place_of(error: Exception) -> str:
    """File and line of the innermost call of this package, behind a comma."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    return f", {Path(own[-1].filename).relative_to(_PACKAGE).as_posix()}:{own[-1].lineno}" if own else ""
