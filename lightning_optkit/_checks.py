# SPDX-License-Identifier: Apache-2.0
"""Argument checks. Every message reads `Owner(argument=value): requirement.`"""

import math
from collections.abc import Iterable
from numbers import Real

__all__ = ["check_in", "check_int", "check_one_of", "check_pattern"]


def check_in(owner: str, name: str, value: float, interval: str) -> float:
    """Returns `value` if it lies in `interval`, written as in mathematics: "[0, 1)", "(0, inf)".

    Raises:
        TypeError: if it is not a real number.
        ValueError: if it lies outside, or is NaN.

    Example:
        >>> check_in("AdamW", "beta2", 0.999, "[0, 1)")
        0.999
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{owner}({name}={value!r}): {name} must be a number in {interval}.")
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if math.isnan(value) or not (above and below):
        raise ValueError(f"{owner}({name}={value!r}): {name} must be in {interval}.")
    return value


def check_int(owner: str, name: str, value: int, minimum: int) -> int:
    """Returns `value` if it is an integer not below `minimum`.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is smaller.

    Example:
        >>> check_int("EMA", "every", 1, minimum=1)
        1
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}({name}={value!r}): {name} must be an integer >= {minimum}.")
    if value < minimum:
        raise ValueError(f"{owner}({name}={value!r}): {name} must be an integer >= {minimum}.")
    return value


def check_one_of(owner: str, name: str, value: object, choices: Iterable[object]) -> None:
    """Passes if `value` is one of `choices`.

    Raises:
        ValueError: naming the choices, if it is not.

    Example:
        >>> check_one_of("AdamW", "rounding", "nearest", ("nearest", "stochastic"))
    """
    choices = tuple(choices)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{owner}({name}={value!r}): {name} must be one of {allowed}.")


def check_pattern(owner: str, name: str, value: str) -> str:
    """Returns `value` if it can be a shell pattern of names.

    Raises:
        TypeError: if it is not a string.
        ValueError: if it is empty.

    Example:
        >>> check_pattern("MaxNorm", "names", "head.*")
        'head.*'
    """
    if isinstance(value, str) and value:
        return value
    error = ValueError if isinstance(value, str) else TypeError
    raise error(f'{owner}({name}={value!r}): {name} must be a shell pattern of names, such as "blocks.*".')
