# SPDX-License-Identifier: Apache-2.0
"""Reads values from a state dict. It may come from any file, so every value is checked before use.

`what` names the value and its owner in error messages: "AdamW.load_state_dict(state_dict=...): 'step' of parameter 0".
"""

import reprlib
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor

from lightning_optkit.step.shards import local

__all__ = ["kind_of", "saved_dict", "saved_floats", "saved_number", "saved_tensor"]

_INTERVAL = "[0, inf)"


def saved_dict(what: str, value: object, names: Sequence[str] = ()) -> Mapping[Any, Any]:
    """`value`, which must be a dict with the keys `names`.

    Raises:
        TypeError: if it is not a dict.
        ValueError: if a key is missing.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be a dict, got {kind_of(value)}.")
    missing = [name for name in names if name not in value]
    if missing:
        raise ValueError(f"{what} must hold {missing[0]!r}.")
    return value


def saved_tensor(what: str, value: object) -> Tensor:
    """`value`, which must be a strided tensor with memory of its own (a DTensor: its local part).

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if it cannot be read.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a tensor, got {kind_of(value)}.")
    reason = _why_unreadable(local(value))
    if reason is not None:
        raise ValueError(f"{what} must be a strided tensor with memory of its own, but it {reason}.")
    return value


def saved_floats(
    what: str, value: object, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, may_be_nan: bool = False
) -> Tensor:
    """A copy of `value` in `dtype`; it must be a tensor of this shape with finite, nonnegative numbers.

    Args:
        what: See above.
        value: The saved value.
        shape: The required shape.
        dtype: A floating-point dtype.
        may_be_nan: Whether NaN is allowed.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if it does not meet the requirements.
    """
    floats = saved_tensor(what, value)
    if not floats.is_floating_point() or local(floats) is not floats:
        raise ValueError(f"{what} must be a tensor of floating-point numbers, whole, got {kind_of(value)}.")
    if floats.shape != shape:
        raise ValueError(f"{what} has shape {list(floats.shape)}; it must have {list(shape)}.")
    copied = floats.detach().to(dtype, copy=True)
    is_sound = copied.isfinite() & (copied >= 0)
    if not bool((is_sound | copied.isnan() if may_be_nan else is_sound).all()):
        raise ValueError(f"{what} must hold numbers in {_INTERVAL}{' or NaN' if may_be_nan else ''}.")
    return copied


def saved_number(what: str, value: object, dtype: torch.dtype = torch.float32, *, signed: bool = False) -> Tensor:
    """`value`, a number or a tensor of one, as a 0-d tensor that shares no memory with it.

    Args:
        what: See above.
        value: The saved value.
        dtype: A real dtype; an integer dtype accepts only integers.
        signed: Whether it may be negative.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it has several elements, or is out of range.
    """
    number: Any = value
    if isinstance(value, Tensor):
        held = local(saved_tensor(what, value))
        if held.numel() != 1:
            raise ValueError(f"{what} must be one number, got shape {list(held.shape)}.")
        number = held.item()
    kind, interval = "a number" if dtype.is_floating_point else "an integer", "(-inf, inf)" if signed else _INTERVAL
    if isinstance(number, bool) or not isinstance(number, Real if dtype.is_floating_point else Integral):
        raise TypeError(f"{what} must be {kind} in {interval}, got {kind_of(value)}.")
    most = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    least = -most if signed else 0
    if not least <= cast(float, number) <= most:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"{what} must be {kind} in {interval} that {name} holds, got {kind_of(number)}.")
    device = value.device if isinstance(value, Tensor) else None
    return torch.tensor(number, dtype=dtype, device=device)


def _why_unreadable(t: Tensor) -> str | None:
    """Why a tensor cannot be copied, worded to follow "it"; None if it can."""
    if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"is a wrapper, {type(t).__name__}"
    if t.layout != torch.strided or t.is_nested or t.is_quantized:
        return "is quantized" if t.is_quantized else "is nested" if t.is_nested else f"is {t.layout}"
    if t.device.type == "meta":
        return "is on the meta device"
    try:
        num_bytes = t.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):
        return "has no memory"
    last = t.storage_offset() + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return f"has {num_bytes} bytes of it" if t.numel() and (last + 1) * t.itemsize > num_bytes else None


def kind_of(value: object) -> str:
    """A one-line description of an unexpected value."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}"
    is_shown = value is None or isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 2**64)
    return reprlib.repr(value) if is_shown else f"{type(value).__name__}"
