# SPDX-License-Identifier: Apache-2.0
"""Tensors of a batch: whether they are finite, and a digest of their values."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["counted_nonfinite", "digest", "nonfinite_part", "tensors_of"]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses.

    Example:
        >>> [t.item() for t in tensors_of({"x": torch.tensor(1), "more": (torch.tensor(2), "text")})]
        [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_of(each)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))


def nonfinite_part(batch: Any) -> str | None:
    """In words, how much of the first tensor with infinite or NaN values is so; None if there is none.

    Example:
        >>> nonfinite_part([torch.tensor([1.0, float("nan")])])
        '1 of 2 numbers of a tensor of shape (2,)'
    """
    for t in tensors_of(batch):
        if t.is_floating_point() and not bool(t.isfinite().all()):
            return f"{counted_nonfinite(t)} of a tensor of shape {tuple(t.shape)}"
    return None


def counted_nonfinite(t: Tensor) -> str:
    """How many of its numbers are infinite or NaN, in words.

    Example:
        >>> counted_nonfinite(torch.tensor([1.0, float("nan")]))
        '1 of 2 numbers'
    """
    return f"{int((~t.isfinite()).sum()):,} of {t.numel():,} numbers"


def digest(batch: Any) -> int:
    """63 bits that differ for batches with different values; 0 for one without tensors.

    Example:
        >>> digest([torch.arange(3)]) == digest((torch.arange(3),))
        True
        >>> digest([torch.arange(3)]) == digest([torch.ones(3)])
        False
    """
    state, is_empty = hashlib.blake2b(digest_size=8), True
    for t in tensors_of(batch):
        dense = t.detach().to("cpu")
        dense = (dense.to_dense() if dense.layout != torch.strided else dense).contiguous()
        state.update(str((tuple(dense.shape), dense.dtype)).encode())
        state.update(dense.reshape(-1).view(torch.uint8).numpy().tobytes())
        is_empty = False
    return 0 if is_empty else int.from_bytes(state.digest(), "little") >> 1
