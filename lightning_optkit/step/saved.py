# SPDX-License-Identifier: Apache-2.0
"""Values out of a state dict: may come from any file, so each is looked at before it is used.

`what` names the value in messages, with its owner: "AdamW.load_state_dict(state_dict=...): 'step' of parameter 0".
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
    """`value`, if it is a dict that holds `names`.

    Raises:
        TypeError: if it is no dict.
        ValueError: if one of them is missing.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be a dict, got {kind_of(value)}.")
    missing = [name for name in names if name not in value]
    if missing:
        raise ValueError(f"{what} must hold {missing[0]!r}.")
    return value


def saved_tensor(what: str, value: object) -> Tensor:
    """`value`, if it is a tensor with numbers to copy: strided, in memory of its own (a DTensor: its local part).

    Raises:
        TypeError: if it is no tensor.
        ValueError: if its numbers cannot be read.
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
    """A copy of `value` in `dtype`, if it is a tensor of this shape of numbers that are finite and not negative.

    Args:
        what: As above.
        value: Looked at.
        shape: That it must have.
        dtype: Of floating point.
        may_be_nan: Whether NaN may stand among them.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if it is another one.
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
        what: As above.
        value: Looked at.
        dtype: Of real numbers; that of integers takes only these.
        signed: Whether it may be negative.

    Raises:
        TypeError: if it is no number.
        ValueError: if there are several, or it is out of range.
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
    """What keeps the numbers of a tensor from being copied, in words that follow "it"; None: nothing."""
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
    """What to call a value that is not what it should be, on one line."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}"
    is_shown = value is None or isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 2**64)
    return reprlib.repr(value) if is_shown else f"{type(value).__name__}"
