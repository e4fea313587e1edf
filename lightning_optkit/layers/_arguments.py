# SPDX-License-Identifier: Apache-2.0
"""What may go into a normalization, in one sentence each."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optkit._checks import NO_LIST, check_int

__all__ = ["check_input", "check_sizes"]


def check_sizes(owner: str, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """The sizes as a tuple, each at least 1."""
    is_several = isinstance(normalized_shape, Sequence) and not isinstance(normalized_shape, NO_LIST)
    sizes: tuple[Any, ...] = tuple(normalized_shape) if is_several else (normalized_shape,)  # type: ignore[arg-type]
    if not sizes:
        raise ValueError(
            f"{owner}(normalized_shape={normalized_shape!r}): normalized_shape must hold at least one size."
        )
    return tuple(check_int(owner, "normalized_shape", size, minimum=1) for size in sizes)


def check_input(
    owner: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
) -> None:
    """Raises for the first argument that does not fit; called when a kernel has refused, so its cost does not count."""
    sizes = check_sizes(owner, normalized_shape)
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is None and name != "input":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{owner}({name}={tensor!r}): {name} must be a tensor.")
        if not tensor.is_floating_point():
            raise ValueError(f"{owner}({name}.dtype={tensor.dtype}): {name} must be floating point.")
        if tensor.device != input.device:
            raise ValueError(
                f"{owner}({name}.device={tensor.device}): must be the device of the input, {input.device}."
            )
    if tuple(input.shape[-len(sizes) :]) != sizes:
        raise ValueError(f"{owner}(input.shape={tuple(input.shape)}): the last dimensions must be {sizes}.")
    if residual is not None and residual.shape != input.shape:
        raise ValueError(
            f"{owner}(residual.shape={tuple(residual.shape)}): must be the shape of the input, {tuple(input.shape)}."
        )
    dtype = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != sizes:
            raise ValueError(f"{owner}({name}.shape={tuple(tensor.shape)}): must be normalized_shape, {sizes}.")
        allowed = {dtype, torch.float32} if dtype.itemsize == 2 else {dtype}
        if tensor.dtype not in allowed:
            names = " or ".join(sorted(str(d) for d in allowed))
            raise ValueError(f"{owner}({name}.dtype={tensor.dtype}): must be {names} beside an input in {dtype}.")
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise ValueError(f"{owner}(bias.dtype={bias.dtype}): must be the dtype of the weight, {weight.dtype}.")
