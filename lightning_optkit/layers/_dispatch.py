# SPDX-License-Identifier: Apache-2.0
"""Selects the implementation of a normalization: our kernels, or torch's where it is faster or the only one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optkit._native import extension, has_cuda_kernels, node, warn_once_if_missing
from lightning_optkit._torch_private import is_batched, is_exporting, is_transformed, is_vmapped, num_dispatch_modes
from lightning_optkit.layers._arguments import check_memory, is_eps, is_freed, is_plain, is_size
from lightning_optkit.layers._reference import survival

if extension is not None:
    from lightning_optkit.layers._ops import add_norm, norm

__all__ = [
    "SMALL_ADD_LAYER",
    "SMALL_ADD_RMS",
    "SMALL_LAYER",
    "SMALL_RMS",
    "SMALL_ROWS",
    "run_add_norm",
    "run_norm",
]

# Without the C++ autograd node: for at most this many elements, in at most SMALL_ROWS rows, torch's CPU kernel is
# faster than building an autograd node in Python (benchmarks/bench_norms.py). Depends only on the shape, so it is the
# same on every rank.
SMALL_ROWS = 256
SMALL_LAYER, SMALL_RMS, SMALL_ADD_LAYER, SMALL_ADD_RMS = 60000, 0, 30000, 0


def run_norm(
    centered: bool, input: Tensor, sizes: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float | None
) -> Tensor:
    """LayerNorm if `centered`, else RMSNorm."""
    if node is not None and not torch.compiler.is_compiling():
        y = node.norm(centered, input, sizes, weight, bias, eps)
        if y is not None:
            return y  # type: ignore[no-any-return]
    _check_row(input, sizes, eps)
    is_small = _is_small(input, sizes, SMALL_LAYER if centered else SMALL_RMS) and _are_there(input, weight, bias)
    if is_small or not (_takes_kernel(input) and _are_plain(weight, bias)):
        if centered:
            return torch.layer_norm(input, sizes, weight, bias, eps)  # type: ignore[arg-type]
        return torch.rms_norm(input, sizes, weight, eps)
    input, weight, bias = _autocast(input, weight, bias)
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)
    return norm(centered, input, weight, bias, len(sizes), _eps(input.dtype, centered) if eps is None else eps)


def run_add_norm(
    centered: bool,
    input: Tensor,
    residual: Tensor,
    sizes: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """(normalized sum, sum)."""
    if not (input.is_nested or residual.is_nested) and input.shape != residual.shape:
        raise RuntimeError("input and residual must have one shape")
    if dropout > 0.0 and is_vmapped():  # torch's op follows the `randomness` of vmap
        input, dropout = torch.dropout(input, dropout, True), 0.0
    seed = _seed() if dropout > 0.0 else None
    if node is not None and not torch.compiler.is_compiling():
        pair = node.add_norm(centered, input, residual, sizes, weight, bias, eps, dropout, seed)
        if pair is not None:
            return pair  # type: ignore[no-any-return]
    _check_row(input, sizes, eps)
    is_small = dropout == 0.0 and _is_small(input, sizes, SMALL_ADD_LAYER if centered else SMALL_ADD_RMS)
    if is_small and _are_there(input, residual, weight, bias):
        total = input + residual
        if centered:
            return torch.layer_norm(total, sizes, weight, bias, eps), total  # type: ignore[arg-type]
        return torch.rms_norm(total, sizes, weight, eps), total
    takes_kernel = _takes_kernel(input) and _takes_kernel(residual) and _are_plain(weight, bias)
    if not (takes_kernel and _goes_with(input, residual)):
        check_memory("add_norm", "input", input)
        check_memory("add_norm", "residual", residual)
        total = input + residual if seed is None else _drop(input, dropout, seed) + residual
        total = total.to(torch.promote_types(input.dtype, residual.dtype))
        return run_norm(centered, total, sizes, weight, bias, eps), total
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)
    if eps is None:
        eps = _eps(torch.promote_types(input.dtype, residual.dtype), centered)
    return add_norm(centered, input, residual, weight, bias, len(sizes), eps, dropout, seed)


def _is_small(input: Tensor, sizes: Sequence[int], limit: int) -> bool:
    if node is not None or input.numel() > limit or not input.is_cpu or extension is None:
        return False
    # With more rows, torch's 16-bit sums lose too much precision.
    return input.numel() <= SMALL_ROWS * (sizes[-1] if len(sizes) == 1 else input.shape[-len(sizes) :].numel())


def _are_there(*tensors: Tensor | None) -> bool:
    """Whether each tensor is plain and its storage exists, which torch's kernels do not check."""
    return torch.compiler.is_compiling() or all(t is None or (is_plain(t) and not is_freed(t)) for t in tensors)


def _takes_kernel(input: Tensor) -> bool:
    if extension is None:
        warn_once_if_missing()
        return False
    # Other tensor types, function transforms and forward-mode derivatives support only torch's ops.
    if torch.compiler.is_compiling():
        return not is_exporting() and (input.is_cpu or (input.is_cuda and has_cuda_kernels()))
    if not is_plain(input) or is_transformed():
        return False
    return input.is_cpu or (input.is_cuda and has_cuda_kernels())


def _are_plain(*parameters: Tensor | None) -> bool:
    return torch.compiler.is_compiling() or all(t is None or is_plain(t) for t in parameters)


def _autocast(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Torch's CUDA autocast runs both norms in float32; its CPU autocast does not change them."""
    if not (input.is_cuda and torch.is_autocast_enabled("cuda")):
        return input, weight, bias
    cast = [t if t is None or t.dtype == torch.float64 else t.float() for t in (input, weight, bias)]
    return cast[0], cast[1], cast[2]  # type: ignore[return-value]


def _goes_with(input: Tensor, residual: Tensor) -> bool:
    if (input.dtype == torch.float64) != (residual.dtype == torch.float64) or input.device != residual.device:
        return False
    if input.is_cuda and torch.is_autocast_enabled("cuda"):  # the sum is then 16-bit and the normalized sum float32
        return torch.promote_types(input.dtype, residual.dtype) in (torch.float32, torch.float64)
    return True


def _eps(dtype: torch.dtype, centered: bool) -> float:
    """Torch's default for RMSNorm: the eps of the dtype it computes in."""
    if centered:
        raise TypeError("LayerNorm has no eps of its own")
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _check_row(input: Tensor, sizes: Sequence[int], eps: float | None) -> None:
    """Checks what neither torch nor our kernels check; the layers raise a clear message."""
    if not isinstance(sizes, Sequence) or not all(is_size(size) for size in sizes) or not is_eps(eps):
        raise TypeError("sizes must be a sequence of integers, and eps a number in [0, inf)")
    if not input.is_nested and tuple(input.shape[-len(sizes) :]) != tuple(sizes):
        raise RuntimeError("the last dimensions of the input must be normalized_shape")


def _drop(input: Tensor, dropout: float, seed: Tensor) -> Tensor:
    # A transform, a trace or another tensor type uses torch's op, the only one it supports.
    if not (is_plain(input) and is_plain(seed)) or _is_watched(input) or _is_watched(seed):
        return torch.dropout(input, dropout, True)
    alive = survival(input, dropout, seed)
    return torch.where(alive > 0, input * alive, 0.0)  # a select, since a dropped infinity times 0 would be NaN


def _is_watched(tensor: Tensor) -> bool:
    return is_batched(tensor) or num_dispatch_modes() > 0


def _seed() -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
