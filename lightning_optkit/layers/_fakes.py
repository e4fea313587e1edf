# SPDX-License-Identifier: Apache-2.0
"""Fake implementations of the ops (traced, fake and meta tensors), with the same checks as the kernels.

The checks are those of csrc/bindings/norm_checks.h, for tensors whose sizes may be symbolic.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_optkit._checks import check_in
from lightning_optkit.layers._arguments import check_eps, check_tensors

__all__: list[str] = []


def _check_given(owner: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            raise ValueError(f"{owner}({name}=None): must be a tensor.")


def _row(owner: str, input: Tensor, dims: int) -> Sequence[int]:
    if not 1 <= dims <= input.dim():
        raise ValueError(f"{owner}(dims={dims}): must be in [1, {input.dim()}], the number of dimensions of the input.")
    return input.shape[input.dim() - dims :]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _stats_shape(input: Tensor, centered: bool, dims: int) -> tuple[int, int]:
    rows = 1
    for size in input.shape[: input.dim() - dims]:
        rows = rows * size
    return 2 if centered else 1, rows


def _stats_like(input: Tensor, centered: bool, dims: int, dtype: torch.dtype) -> Tensor:
    return input.new_empty(_stats_shape(input, centered, dims), dtype=_wide(dtype))


def _check(owner: str, name: str, tensor: Tensor, input: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if tensor.device != input.device:
        raise ValueError(f"{owner}({name}.device={tensor.device}): must be the device of the input, {input.device}.")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{owner}({name}.shape={tuple(tensor.shape)}): must be {tuple(shape)}.")
    if tensor.dtype != dtype:
        raise ValueError(f"{owner}({name}.dtype={tensor.dtype}): must be {dtype}.")


def _check_dropout(owner: str, dropout: float, seed: Tensor | None, input: Tensor) -> None:
    check_in(owner, "dropout", dropout, "[0, 1]")
    if seed is None:
        if dropout > 0.0:
            raise ValueError(f"{owner}(seed=None): must be an int64 number on CPU where dropout is above 0.")
        return
    if seed.dtype != torch.int64:
        raise ValueError(f"{owner}(seed.dtype={seed.dtype}): must be torch.int64.")
    if seed.numel() != 1:
        raise ValueError(f"{owner}(seed.shape={tuple(seed.shape)}): must be one number.")
    if not (seed.is_cpu or (seed.is_meta and input.is_meta)):
        raise ValueError(f"{owner}(seed.device={seed.device}): must be cpu.")


def _norm_fake(
    owner: str, centered: bool, input: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float
) -> tuple[Tensor, Tensor]:
    _check_given(owner, input=input)
    check_tensors(owner, input, None, weight, bias, _row(owner, input, dims))
    check_eps(owner, eps, optional=False)
    y = input.new_empty(input.shape)
    return y, _stats_like(input, centered, dims, input.dtype)


def _add_norm_fake(
    owner: str,
    centered: bool,
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_given(owner, input=input, residual=residual)
    check_tensors(owner, input, residual, weight, bias, _row(owner, input, dims))
    if (input.dtype == torch.float64) != (residual.dtype == torch.float64):
        raise ValueError(f"{owner}(residual.dtype={residual.dtype}): float64 goes with float64 only.")
    check_eps(owner, eps, optional=False)
    _check_dropout(owner, dropout, seed, input)
    dtype = torch.promote_types(input.dtype, residual.dtype)
    y, total = input.new_empty(input.shape, dtype=dtype), input.new_empty(input.shape, dtype=dtype)
    return y, total, _stats_like(input, centered, dims, dtype)


def _norm_backward_fake(
    centered: bool,
    dy: Tensor,
    d_sum: Tensor | None,
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    dims: int,
    dropout: float,
    seed: Tensor | None,
    wants_input: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    owner = "norm_backward"
    _check_given(owner, dy=dy, input=input, stats=stats)
    sizes = _row(owner, input, dims)
    check_tensors(owner, input, None, weight, None, sizes)
    _check(owner, "dy", dy, input, input.shape, input.dtype)
    if d_sum is not None:
        _check(owner, "d_sum", d_sum, input, input.shape, input.dtype)
    _check(owner, "stats", stats, input, _stats_shape(input, centered, dims), _wide(input.dtype))
    _check_dropout(owner, dropout, seed, input)
    dtype = _wide(input.dtype) if weight is None else weight.dtype
    nothing = input.new_empty((0,))
    return (
        input.new_empty(input.shape) if wants_input else nothing,
        input.new_empty(input.shape) if wants_input and dropout > 0.0 else input.new_empty((0,)),
        input.new_empty(sizes, dtype=dtype) if wants_weight else input.new_empty((0,)),
        input.new_empty(sizes, dtype=dtype) if wants_bias else input.new_empty((0,)),
    )


for _name in ("norm", "_norm"):
    torch.library.register_fake(f"lightning_optkit::{_name}", partial(_norm_fake, _name))
for _name in ("add_norm", "_add_norm"):
    torch.library.register_fake(f"lightning_optkit::{_name}", partial(_add_norm_fake, _name))
torch.library.register_fake("lightning_optkit::norm_backward", _norm_backward_fake)
