# SPDX-License-Identifier: Apache-2.0
"""Compares two states, of a callback or a random generator, entry by entry."""

from typing import Any

import torch

__all__ = ["is_same_state"]


def is_same_state(one: Any, other: Any) -> bool:
    """Whether both have the same entries; NaN is equal to NaN."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return (
            one.shape == other.shape
            and torch.equal(one.isnan(), other.isnan())
            and torch.equal(*(t.nan_to_num() for t in (one, other)))
        )
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return False  # of which only one is
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same_state(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(is_same_state, one, other))
    return bool(one == other or (one != one and other != other))
