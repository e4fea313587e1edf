# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of a normalization."""

import math
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optkit._checks import NO_LIST, check_in, check_int

__all__ = [
    "check_eps",
    "check_images",
    "check_memory",
    "check_norm",
    "check_sizes",
    "check_tensors",
    "is_eps",
    "is_freed",
    "is_plain",
    "is_size",
]

_PLAIN = (Tensor, Parameter)
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` has torch's own type and sizes and strides; a subclass may have no memory of its own."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_nested


def is_freed(tensor: Tensor) -> bool:
    """Whether the storage of a plain tensor was freed."""
    try:
        return tensor.numel() > 0 and tensor.data_ptr() == 0
    except RuntimeError:  # the wrapper of a function transform has no storage
        return False


def is_size(size: object) -> bool:
    """Whether `size` can be an entry of `normalized_shape`: an integer, possibly symbolic."""
    return isinstance(size, Integral | torch.SymInt) and not isinstance(size, bool)


def is_eps(eps: object) -> bool:
    """Whether `eps` is a number in [0, inf), or None."""
    return eps is None or (isinstance(eps, Real | Tensor | torch.SymFloat) and 0.0 <= float(eps) < math.inf)


def check_sizes(owner: str, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """Checks the sizes, each at least 1, and returns them as a tuple."""
    is_several = isinstance(normalized_shape, Sequence) and not isinstance(normalized_shape, NO_LIST)
    sizes: tuple[Any, ...] = tuple(normalized_shape) if is_several else (normalized_shape,)  # type: ignore[arg-type]
    if not sizes:
        raise ValueError(
            f"{owner}(normalized_shape={normalized_shape!r}): normalized_shape must hold at least one size."
        )
    plain = (int(size) if isinstance(size, Integral) and is_size(size) else size for size in sizes)
    return tuple(check_int(owner, "normalized_shape", size, minimum=1) for size in plain)


def check_eps(owner: str, eps: float | None, optional: bool) -> None:
    """Raises unless `eps` is a number in [0, inf), or None if `optional`."""
    if eps is None and not optional:
        raise TypeError(f"{owner}(eps=None): eps must be a number in [0, inf).")
    if eps is not None:
        is_number = isinstance(eps, Tensor) and eps.numel() == 1 and not (eps.is_complex() or eps.is_meta)
        check_in(owner, "eps", float(eps) if is_number else eps, "[0, inf)")


def check_norm(
    owner: str,
    centered: bool,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    *residual: Tensor,
) -> None:
    """Raises for the first invalid argument. Called only after a kernel refused, so its cost does not matter."""
    if not isinstance(normalized_shape, Sequence) or isinstance(normalized_shape, str):
        raise TypeError(f"{owner}(normalized_shape={normalized_shape!r}): must be a tuple or list of integers.")
    sizes = check_sizes(owner, normalized_shape)
    for name, tensor in (("input", input), *(("residual", tensor) for tensor in residual)):
        _check_tensor(owner, name, tensor)
    if not input.is_nested and tuple(input.shape[-len(sizes) :]) != sizes:
        raise ValueError(f"{owner}(input.shape={tuple(input.shape)}): the last dimensions must be {sizes}.")
    check_tensors(owner, input, residual[0] if residual else None, weight, bias, sizes)
    check_eps(owner, eps, optional=not centered)
    _check_types(owner, {"input": input, "residual": (residual or (None,))[0], "weight": weight, "bias": bias})


def check_images(owner: str, input: Tensor, channels: int) -> None:
    """Raises unless `input` is a tensor of (N, C, H, W) with this number of channels."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{owner}(input={input!r}): input must be a tensor.")
    if input.is_nested or input.dim() != 4 or input.shape[1] != channels:
        shape = "nested" if input.is_nested else tuple(input.shape)
        raise ValueError(f"{owner}(input.shape={shape}): must be (N, {channels}, H, W).")


def _check_types(owner: str, tensors: dict[str, Tensor | None]) -> None:
    """Arguments that fit but were refused have a type that torch's own op does not support."""
    reason = (str(sys.exc_info()[1]).splitlines() or ["no reason given"])[0].rstrip(".:;")
    for name, tensor in tensors.items():
        if tensor is not None and not is_plain(tensor):
            kind = "nested" if type(tensor) is Tensor else type(tensor).__name__
            raise TypeError(
                f"{owner}({name}={kind}): torch's own formula, which such a tensor takes, must accept it ({reason})."
            )


def check_tensors(
    owner: str,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sizes: Sequence[int],
) -> None:
    """Raises for the first tensor that does not fit the others; `sizes` are those of a row of the input."""
    _check_tensor(owner, "input", input)
    dtype = input.dtype
    if residual is not None:
        _check_like(owner, "residual", residual, input)
        dtype = torch.promote_types(dtype, residual.dtype)
    allowed = {dtype, torch.float32} if dtype.itemsize == 2 else {dtype}
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        _check_tensor(owner, name, tensor)
        _check_device(owner, name, tensor, input)
        if tensor.is_nested:
            raise ValueError(f"{owner}({name}.is_nested=True): must be one tensor of normalized_shape, {tuple(sizes)}.")
        if tuple(tensor.shape) != tuple(sizes):
            raise ValueError(f"{owner}({name}.shape={tuple(tensor.shape)}): must be normalized_shape, {tuple(sizes)}.")
        if tensor.dtype not in allowed:
            names = " or ".join(sorted(str(d) for d in allowed))
            raise ValueError(f"{owner}({name}.dtype={tensor.dtype}): must be {names} beside an input in {dtype}.")
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise ValueError(f"{owner}(bias.dtype={bias.dtype}): must be the dtype of the weight, {weight.dtype}.")


def _check_like(owner: str, name: str, tensor: Tensor, input: Tensor) -> None:
    _check_tensor(owner, name, tensor)
    _check_device(owner, name, tensor, input)
    if not (tensor.is_nested or input.is_nested) and tensor.shape != input.shape:
        raise ValueError(
            f"{owner}({name}.shape={tuple(tensor.shape)}): must be the shape of the input, {tuple(input.shape)}."
        )


def _check_device(owner: str, name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"{owner}({name}.device={tensor.device}): must be the device of the input, {input.device}.")


def _check_tensor(owner: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{owner}({name}={tensor!r}): {name} must be a tensor.")
    if not tensor.is_floating_point():
        raise ValueError(f"{owner}({name}.dtype={tensor.dtype}): {name} must be floating point.")
    if tensor.dtype not in _FLOATING:
        names = ", ".join(str(dtype) for dtype in _FLOATING)
        raise ValueError(f"{owner}({name}.dtype={tensor.dtype}): must be one of {names}.")
    if tensor.layout not in (torch.strided, torch.jagged):
        raise ValueError(f"{owner}({name}.layout={tensor.layout}): must be torch.strided.")
    check_memory(owner, name, tensor)


def check_memory(owner: str, name: str, tensor: Tensor | None) -> None:
    """Raises unless the storage covers the range of shape and strides; it may have been resized or freed."""
    if tensor is None or not is_plain(tensor) or not (tensor.is_cpu or tensor.is_cuda):
        return
    try:
        stored, needed = tensor.untyped_storage().nbytes(), _reach(tensor)
    except NotImplementedError:  # the wrapper of a function transform has no storage
        return
    if stored < needed:
        raise ValueError(
            f"{owner}({name}.untyped_storage().nbytes()={stored}): must be the {needed} bytes that its shape and "
            "strides lead to."
        )


def _reach(tensor: Tensor) -> int:
    """Bytes from the start of the storage to the end of the last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()
