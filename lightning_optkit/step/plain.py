# SPDX-License-Identifier: Apache-2.0
"""Whether a tensor has memory, and whether its numbers can be read there."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optkit._torch_private import innermost_transform, is_fake, local_shard

__all__ = [
    "has_dispatch",
    "has_lost_memory",
    "is_dense",
    "is_partial",
    "refuse_transforms",
    "why_no_parameter",
    "why_unusable",
]


def has_dispatch(t: Tensor) -> bool:
    """Whether the class of `t` overrides `__torch_dispatch__`, so that its data pointer is meaningless."""
    return type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__


def is_partial(t: Tensor) -> bool:
    """Whether each process holds a summand of `t`, so that a step of one summand would be meaningless."""
    return isinstance(t, DTensor) and any(placement.is_partial() for placement in t.placements)


def has_lost_memory(t: Tensor) -> bool:
    """Whether the storage of a plain tensor is smaller than its shape requires: it was freed or resized."""
    if has_dispatch(t) or t.layout != torch.strided or t.numel() == 0:
        return False
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.untyped_storage().nbytes() < (t.storage_offset() + span) * t.element_size()


def why_unusable(t: Tensor) -> str | None:
    """Why a step can neither read nor write `t`, or None."""
    t = local_shard(t) if isinstance(t, DTensor) else t
    if is_fake(t):
        return "is a FakeTensor, which holds no numbers"
    if t.is_meta:
        return "is on the meta device, which holds no numbers"
    if has_lost_memory(t):
        return "has lost its memory: its storage holds less than its shape needs"
    return "is lazily conjugated; call resolve_conj() before" if t.is_conj() else None


def why_no_parameter(t: Tensor) -> str | None:
    """Why a step cannot update `t`, or None."""
    if t.is_nested:
        return "is nested: its rows have lengths of their own"
    reason = why_unusable(t)
    if reason is not None:
        return reason
    if not (t.is_floating_point() or t.is_complex()):
        return f"holds {str(t.dtype).removeprefix('torch.')}; it must hold floating-point or complex numbers"
    if t.layout != torch.strided:
        return f"is {str(t.layout).removeprefix('torch.')}; only its gradient may be"
    if not has_dispatch(t) and any(stride == 0 < size - 1 for stride, size in zip(t.stride(), t.shape, strict=True)):
        return "is expanded: several of its elements are one number in memory; call contiguous() before"
    return None


def refuse_transforms(owner: str) -> None:
    """Raises inside a torch.func transform, where new tensors are wrappers that must not be kept."""
    if innermost_transform() is not None:
        raise RuntimeError(f"{owner}.step: called inside a transform of torch.func; step outside of it.")


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill a block of memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True
