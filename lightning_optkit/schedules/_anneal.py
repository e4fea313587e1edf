# SPDX-License-Identifier: Apache-2.0
"""Interpolation between two values, shared by the schedules."""

import math

__all__ = ["anneal"]


def anneal(start: float, end: float, progress: float, shape: str) -> float:
    """Value between `start` (progress 0) and `end` (progress 1), exact at both.

    Args:
        start: First value; positive if `shape` is "exponential".
        end: Last value; positive if `shape` is "exponential".
        progress: Position between the two, in [0, 1].
        shape: "linear", "cosine", "1-sqrt" (a fraction x is covered at progress x^2) or "exponential" (equal ratios).

    Example:
        >>> anneal(1.0, 0.0, 0.25, "1-sqrt")
        0.5
    """
    if shape == "exponential":
        return float(start ** (1 - progress) * end**progress)
    weight = {"linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2, "1-sqrt": math.sqrt(progress)}
    return (1 - weight[shape]) * start + weight[shape] * end
