# SPDX-License-Identifier: Apache-2.0
"""One value that a schedule writes."""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Target"]


@dataclass(frozen=True)
class Target:
    """One scheduled value.

    Args:
        label: Its name.
        base: Its value at factor 1.
        write: Sets the value.
    """

    label: str
    base: float
    write: Callable[[float], None]
