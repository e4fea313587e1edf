# SPDX-License-Identifier: Apache-2.0
"""L2 norms over the whole range of fp32: the square of 1e20 overflows, that of 1e-25 underflows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optkit._torch_private import foreach_norm
from lightning_optkit.step.plain import is_partial
from lightning_optkit.step.shards import local, reduce_sum_, sharding_groups

__all__ = ["each_norm", "inner_product", "norm", "total_norm"]

# Outside these bounds, squares of single elements may have over- or underflowed in fp32; see squares_hold in
# csrc/core/math.h.
_LEAST, _BEYOND = 2.0**-42, float("inf")


def norm(t: Tensor, dim: list[int] | None = None, *, keepdim: bool = False) -> Tensor:
    """L2 norm of a tensor, or over its dimensions `dim`, in fp64 (fp32 on a device without fp64).

    Does not synchronize. On CPU, squares are first added in fp32, which is correct except for extreme values, and ten
    times as fast.

    Args:
        t: A dense tensor of any floating or complex dtype.
        dim: Dimensions to reduce; None: all.
        keepdim: Keep them, with size 1.

    Example:
        >>> norm(torch.tensor([3e30, 4e30]))
        tensor(5.0000e+30, dtype=torch.float64)
    """
    wide = torch.float32 if t.device.type == "mps" else torch.float64
    if t.device.type == "cpu" and not isinstance(t, DTensor):
        fast = _added_in(torch.float32, t, dim, keepdim)
        if bool(((fast >= _LEAST) & (fast < _BEYOND)).all()):
            return fast.to(wide)
    return _added_in(wide, t, dim, keepdim)


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of all elements of all tensors, 0-d, on the device of the first; over all processes if sharded.

    Example:
        >>> total_norm([torch.tensor([3e-30]), torch.tensor([4e-30])])
        tensor(5.0000e-30, dtype=torch.float64)
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    norms = each_norm(tensors)
    total: Tensor = torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]))
    return total


def each_norm(tensors: Sequence[Tensor]) -> list[Tensor]:
    """L2 norm of each tensor, 0-d, on its device; over all processes if sharded, by one all-reduce for all of them.

    Example:
        >>> each_norm([torch.tensor([3.0, 4.0]), torch.tensor([1.0])])
        [tensor(5., dtype=torch.float64), tensor(1., dtype=torch.float64)]
    """
    tensors = [t.full_tensor() if isinstance(t, DTensor) and is_partial(t) else t for t in tensors]
    norms = _of_each([local(t) for t in tensors])
    alike: dict[tuple[Any, ...], list[int]] = {}
    for place, t in enumerate(tensors):
        if groups := sharding_groups(t):
            alike.setdefault(groups, []).append(place)
    for groups, places in alike.items():
        sums = reduce_sum_(torch.stack([norms[place].square() for place in places]), groups)
        for place, root in zip(places, sums.sqrt().unbind(), strict=True):
            norms[place] = root
    return norms


def _of_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`norm` of each; on CPU by one call for all, and one look at their range."""
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    together = [place for place, t in enumerate(tensors) if t.device.type == "cpu" and t.dtype in narrow]
    norms = [None if place in {*together} else norm(t) for place, t in enumerate(tensors)]
    if together:
        fast = torch.stack(foreach_norm([tensors[place] for place in together], 2.0, dtype=torch.float32))
        holds = ((fast >= _LEAST) & (fast < _BEYOND)).tolist()
        for place, each, is_right in zip(together, fast.double().unbind(), holds, strict=True):
            norms[place] = each if is_right else norm(tensors[place])
    return [each for each in norms if each is not None]


def _added_in(dtype: torch.dtype, t: Tensor, dim: list[int] | None, keepdim: bool) -> Tensor:
    wide = torch.promote_types(t.dtype, dtype)
    if dim is None and t.is_cuda and not (t.is_complex() or isinstance(t, DTensor)):
        return foreach_norm([t], 2.0, dtype=wide)[0]  # without a copy in that dtype, unlike vector_norm
    result: Tensor = torch.linalg.vector_norm(t, dim=dim, keepdim=keepdim, dtype=wide)
    return result.abs() if result.is_complex() else result


def inner_product(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Tensor:
    """Inner product over all elements of all pairs, 0-d, in fp64; a pair with a None counts as zero.

    Over all processes if the tensors of a pair are sharded, alike.

    Example:
        >>> inner_product([torch.tensor([1e20, 2.0]), None], [torch.tensor([1e20, 0.0]), torch.ones(2)])
        tensor(1.0000e+40, dtype=torch.float64)
    """
    parts: dict[tuple[Any, ...], list[Tensor]] = {}  # by the processes over which the tensors are sharded
    for a, b in zip(first, second, strict=True):
        if a is not None and b is not None:
            wide = torch.promote_types(a.dtype, torch.float32 if a.device.type == "mps" else torch.float64)
            product = (local(a).to(wide).conj() * local(b).to(wide)).sum().real
            parts.setdefault(sharding_groups(a), []).append(product)
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    sums = [
        reduce_sum_(torch.stack([part.to(each[0].device) for part in each]).sum(), groups)
        for groups, each in parts.items()
    ]
    return torch.stack([part.to(sums[0].device) for part in sums]).sum()
