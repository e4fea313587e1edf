# SPDX-License-Identifier: Apache-2.0
"""The ways from one value to another that schedules share."""

import math

__all__ = ["anneal"]


def anneal(start: float, end: float, progress: float, shape: str) -> float:
    """Value on the way from `start` (progress 0) to `end` (progress 1), exact at both.

    Args:
        start: First value; positive where `shape` is "exponential".
        end: Last value; positive where `shape` is "exponential".
        progress: Share of the way, in [0, 1].
        shape: "linear", "cosine", "1-sqrt" (of the way, the square root is gone) or "exponential" (equal ratios).

    Example:
        >>> anneal(1.0, 0.0, 0.25, "1-sqrt")
        0.5
    """
    if shape == "exponential":
        return float(start ** (1 - progress) * end**progress)
    weight = {"linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2, "1-sqrt": math.sqrt(progress)}
    return (1 - weight[shape]) * start + weight[shape] * end
