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

__all__ = ["zeros_like_all"]

_ALIGNMENT = 64  # bytes: one cache line, the width of the widest vector
_HUGE_PAGE = 2 * 1024 * 1024


def zeros_like_all(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Zeros with the shape and device of each tensor and the given dtypes; also with its strides, if it has no gaps."""
    num_bytes = [
        -(-t.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for t, dtype in zip(tensors, dtypes, strict=True)
    ]
    if extension is None or sum(num_bytes) < 2 * _HUGE_PAGE or not all(_is_plain_on_cpu(t) for t in tensors):
        return [_zeros_like(t, dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    arena = torch.empty(sum(num_bytes) + _HUGE_PAGE, dtype=torch.uint8, device="cpu")
    extension.advise_huge_pages(arena)
    arena.zero_()
    offset = -arena.data_ptr() % _HUGE_PAGE
    views = []
    for t, dtype, size in zip(tensors, dtypes, num_bytes, strict=True):
        flat = arena[offset : offset + t.numel() * dtype.itemsize].view(dtype)
        views.append(flat.as_strided(t.shape, _dense_stride(t)))
        offset += size
    return views


def _is_plain_on_cpu(t: Tensor) -> bool:
    return t.device.type == "cpu" and not has_dispatch(t)


def _zeros_like(t: Tensor, dtype: torch.dtype) -> Tensor:
    if has_dispatch(t):
        return torch.zeros_like(t, dtype=dtype, requires_grad=False)
    return torch.empty_strided(t.shape, _dense_stride(t), dtype=dtype, device=t.device).zero_()


def _dense_stride(t: Tensor) -> tuple[int, ...]:
    return torch.empty_like(t, device="meta").stride()
