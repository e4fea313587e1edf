# SPDX-License-Identifier: Apache-2.0
"""Numbers that a tensor can be multiplied by: an int, a float, a NumPy scalar. Bools and Fractions are refused."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from lightning_optkit._checks._shown import shown

__all__ = ["NO_LIST", "check_in", "check_int", "check_numbers", "check_whole"]

NO_LIST = (str, bytes, bytearray, memoryview)  # sequences of characters or bytes
_END = 2**63  # bound of the integers that torch supports


def check_in(owner: str, name: str, value: float, interval: str) -> float:
    """Returns `value` if it lies in `interval`, written as in mathematics: "[0, 1)", "(0, inf)".

    Raises:
        TypeError: if it is not a real number.
        ValueError: if it lies outside, is NaN, or is too large for a float.

    Example:
        >>> check_in("AdamW", "beta2", 0.999, "[0, 1)")
        0.999
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | np.number)
        or isinstance(value, np.complexfloating)
    ):
        raise TypeError(f"{owner}({name}={shown(value)}): {name} must be a number in {interval}.")
    low, high = _bounds(interval)
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):  # also NaN
        raise ValueError(f"{owner}({name}={shown(value)}): {name} must be in {interval}.")
    try:
        float(value)
    except OverflowError:
        message = f"{owner}({name}={shown(value)}): {name} must be in {interval}, and small enough for a float."
        raise ValueError(message) from None
    return value


@lru_cache(64)  # a schedule is checked in every step
def _bounds(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)


def check_int(owner: str, name: str, value: int, minimum: int) -> int:
    """Returns `value` if it is an integer not below `minimum`, and below 2**63.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is smaller or larger.

    Example:
        >>> check_int("EMA", "every", 1, minimum=1)
        1
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}({name}={shown(value)}): {name} must be an integer >= {minimum}.")
    if not minimum <= value < _END:
        most = "" if value < minimum else ", and less than 2**63"
        raise ValueError(f"{owner}({name}={shown(value)}): {name} must be an integer >= {minimum}{most}.")
    return value


def check_whole(owner: str, name: str, value: int) -> int:
    """Returns `value` if it is an integer of either sign within torch's range, e.g. a dimension.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if its magnitude is 2**63 or more.

    Example:
        >>> check_whole("Standardize", "feature_dim", -1)
        -1
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}({name}={shown(value)}): {name} must be an integer, such as 1 or -1.")
    if not -_END < value < _END:
        raise ValueError(f"{owner}({name}={shown(value)}): {name} must be an integer of less than 64 bits.")
    return value


def check_numbers(owner: str, name: str, value: Any, count: int, interval: str) -> tuple[float, ...]:
    """Returns `value` as `count` numbers, each in `interval`.

    Raises:
        TypeError: if it is not a sequence of numbers.
        ValueError: if it has another length, or a number lies outside.

    Example:
        >>> check_numbers("RobustScale", "quantile_range", [25, 75], 2, "[0, 100]")
        (25, 75)
    """
    requirement = f"{name} must be {_COUNTS[count]} numbers in {interval}"
    if isinstance(value, NO_LIST) or not isinstance(value, Sequence):
        raise TypeError(f"{owner}({name}={shown(value)}): {requirement}.")
    if len(value) != count:
        raise ValueError(f"{owner}({name}={shown(value)}): {requirement}, got {len(value)}.")
    return tuple(check_in(owner, name, number, interval) for number in value)


_COUNTS = {2: "two", 3: "three"}
