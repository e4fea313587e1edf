# SPDX-License-Identifier: Apache-2.0
"""Allocates optimizer state; on CPU, in one arena of huge pages.

A step over large tensors touches thousands of 4 KiB pages in seven streams and waits for the page table; 2 MiB pages
need 512 times fewer entries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optkit._native import extension
from lightning_optkit.step.plain import has_dispatch

__all__ = ["Arena", "arena_for", "zeros_like_all"]

_ALIGNMENT = 64  # bytes: one cache line, the width of the widest vector
_HUGE_PAGE = 2 * 1024 * 1024


class Arena:
    """Memory of huge pages for many tensors. A page that is never taken is never touched, and takes no memory.

    Args:
        tensors: The tensors that there must be room for.
        dtypes: The dtype of each.
    """

    def __init__(self, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
        assert extension is not None
        self._memory = torch.empty(_size_of(tensors, dtypes) + _HUGE_PAGE, dtype=torch.uint8, device="cpu")
        extension.advise_huge_pages(self._memory)
        self._offset = -self._memory.data_ptr() % _HUGE_PAGE

    def has_room(self, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> bool:
        """Whether they fit into what is left."""
        is_there = all(map(_is_plain_on_cpu, tensors))
        return is_there and self._offset + _size_of(tensors, dtypes) <= self._memory.numel()

    def take(self, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """Zeros like `tensors`, in the next bytes."""
        self._memory[self._offset : self._offset + _size_of(tensors, dtypes)].zero_()
        views = []
        for t, dtype in zip(tensors, dtypes, strict=True):
            flat = self._memory[self._offset : self._offset + t.numel() * dtype.itemsize].view(dtype)
            views.append(flat.as_strided(t.shape, _dense_stride(t)))
            self._offset += _size_of([t], [dtype])
        return views


def zeros_like_all(
    tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], arena: Arena | None = None
) -> list[Tensor]:
    """Zeros with the shape and device of each tensor and the given dtypes; also with its strides, if it has no gaps.

    Args:
        tensors: What they are like.
        dtypes: The dtype of each.
        arena: Memory to take them from, if there is room. Default: a new arena, if they are large.
    """
    if arena is not None and arena.has_room(tensors, dtypes):
        return arena.take(tensors, dtypes)
    arena = arena_for(tensors, dtypes)
    return (
        [_zeros_like(*each) for each in zip(tensors, dtypes, strict=True)]
        if arena is None
        else arena.take(tensors, dtypes)
    )


def arena_for(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> Arena | None:
    """An arena for these tensors; None if they are too small, or not all plain tensors on the CPU."""
    is_worth_it = extension is not None and _size_of(tensors, dtypes) >= 2 * _HUGE_PAGE
    return Arena(tensors, dtypes) if is_worth_it and all(map(_is_plain_on_cpu, tensors)) else None


def _size_of(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> int:
    """Bytes in the arena, where each tensor begins at a cache line."""
    each = zip(tensors, dtypes, strict=True)
    return sum(-(-t.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for t, dtype in each)


def _is_plain_on_cpu(t: Tensor) -> bool:
    return t.device.type == "cpu" and not has_dispatch(t)


def _zeros_like(t: Tensor, dtype: torch.dtype) -> Tensor:
    if has_dispatch(t):
        return torch.zeros_like(t, dtype=dtype, requires_grad=False)
    return torch.empty_strided(t.shape, _dense_stride(t), dtype=dtype, device=t.device).zero_()


def _dense_stride(t: Tensor) -> tuple[int, ...]:
    return torch.empty_like(t, device="meta").stride()
