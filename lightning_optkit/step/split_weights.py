# SPDX-License-Identifier: Apache-2.0
"""fp32 weights in two parts, in plain PyTorch: a bf16 parameter, and an integer correction in the optimizer's state.

The parameter is the fp32 number rounded to bf16. The correction is the difference of their bits, in units of fp32's
last place (16 bits: exact), or of 256 of them (8 bits: 16 significant bits are kept, rounded stochastically). The same
arithmetic as csrc/cpu/split_weights.h.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optkit.step.shards import local

__all__ = [
    "CORRECTIONS",
    "LOW_ORDER_PARTS",
    "correction_of",
    "is_cast",
    "join",
    "joined",
    "low_order_part",
    "part_kept",
    "rest_of",
    "split_",
    "split_off",
    "whole",
]

CORRECTIONS = {"correction8": torch.int8, "correction16": torch.int16}
"""Names of the correction in the state of a parameter, and its dtype."""

LOW_ORDER_PARTS = {"kahan": "compensation", "split24": "correction8", "split32": "correction16"}
"""Name in the state of what a parameter could not store, by the rounding that keeps it."""

_NAN = 0x7FC00000


def part_kept(rounding: str, param: Tensor) -> str | None:
    """Name of the low-order part that a parameter keeps under `rounding`, or None."""
    part = LOW_ORDER_PARTS.get(rounding)
    return None if part in CORRECTIONS and param.dtype != torch.bfloat16 else part


def join(param: Tensor, correction: Tensor) -> Tensor:
    """The fp32 number that both parts represent.

    Anyone may write the parameter between two steps: the correction of its former value then moves it by at most half a
    unit of bf16's last place. Where it is infinite or zero, the correction is dropped.

    Args:
        param: bf16.
        correction: int8 or int16, of the same shape.

    Example:
        >>> weight, correction = torch.zeros(2).bfloat16(), torch.zeros(2, dtype=torch.int16)
        >>> _ = split_(weight, correction, torch.tensor([1.0001, -3e-9]))
        >>> weight
        tensor([ 1.0000e+00, -2.9977e-09], dtype=torch.bfloat16)
        >>> torch.equal(join(weight, correction), torch.tensor([1.0001, -3e-9]))
        True
    """
    shift = 8 if correction.dtype == torch.int8 else 0
    bits = (param.detach().view(torch.int16).to(torch.int32) << 16) + (correction.to(torch.int32) << shift)
    value, written = bits.view(torch.float32), param.detach().to(torch.float32)
    return torch.where((written == 0) | ~written.isfinite(), written, value)


def rest_of(param: Tensor, compensation: Tensor) -> Tensor:
    """What Kahan summation kept of a parameter, unless it is too large for that: left of a former, larger value.

    Anyone may write the parameter between two steps: it is then off by at most a unit of its last place. -0 leaves even
    -0 as it is.

    Args:
        param: Floating point.
        compensation: Of the same dtype and shape.

    Returns:
        fp32 or fp64, of the same shape.

    Example:
        >>> rest_of(torch.tensor([1.0, 0.0]).bfloat16(), torch.tensor([0.0012, 0.0012]).bfloat16())
        tensor([0.0012, -0.0000])
    """
    work = torch.promote_types(param.dtype, torch.float32)
    stored, rest = param.detach().to(work), compensation.to(work)
    half_unit = torch.finfo(param.dtype).eps / 2 * (1 + torch.finfo(work).eps)  # the next number: half a unit is kept
    return torch.where(rest.abs() < stored.abs() * half_unit, rest, -0.0)


def is_cast(name: object, value: object) -> bool:
    """Whether this is a correction that went through torch's class, which casts state to the dtype of the parameter."""
    return name in CORRECTIONS and isinstance(value, Tensor) and value.is_floating_point()


def correction_of(state: Mapping[str, Any]) -> Tensor | None:
    """The correction in the state of a parameter, or None."""
    return next((state[name] for name in CORRECTIONS if name in state), None)


def joined(param: Tensor, state: Mapping[str, Any]) -> Tensor:
    """The value that a step works on: `param`, joined with its correction where it has one.

    If `param` is the local part of a sharded parameter, so is the result.
    """
    correction = correction_of(state)
    if correction is None:
        return param
    return join(param, correction if isinstance(param, DTensor) else local(correction))


def low_order_part(state: Mapping[str, Any]) -> Tensor | None:
    """What the parameter could not store, whatever the rounding, or None."""
    return next((state[name] for name in LOW_ORDER_PARTS.values() if name in state), None)


def whole(param: Tensor, low_order: Tensor | None) -> Tensor:
    """A 16-bit parameter with its low-order part, in fp32."""
    if low_order is not None and low_order.dtype in CORRECTIONS.values():
        return join(param, low_order)
    value = param.detach().to(torch.float32)
    return value if low_order is None else value + rest_of(param, low_order)


def split_off(param: Tensor, name: str, value: Tensor) -> Tensor:
    """The low-order part `name` of `value`.

    Args:
        param: 16 bits; already rounded from `value`. A correction overwrites it, since it rounds ties upwards.
        name: One of `LOW_ORDER_PARTS`.
        value: fp32, of the same shape.
    """
    if name not in CORRECTIONS:
        difference = value - param.to(torch.float32)
        return torch.where(difference.isfinite(), difference, 0.0).to(param.dtype)
    correction = torch.empty_like(param, dtype=CORRECTIONS[name])
    split_(param, correction, value)
    return correction


def split_(param: Tensor, correction: Tensor, value: Tensor, random: Tensor | None = None) -> Tensor:
    """Splits `value` into its two parts, and returns what they represent. A NaN becomes the canonical NaN.

    Args:
        param: bf16; overwritten.
        correction: int8 or int16, of the same shape; overwritten.
        value: fp32, of the same shape.
        random: 32 random bits per element, as int64, for the rounding of 8 bits; None: round to nearest.

    Returns:
        fp32, of the same shape. Beyond the largest bf16 number it is not what `join` gives: the parameter is infinite.
    """
    bits = value.contiguous().view(torch.int32).to(torch.int64)
    bits = torch.where(value.isnan(), _NAN, bits)
    if correction.dtype == torch.int8:
        bits = (bits + (0x80 if random is None else random >> 24)) & ~0xFF
    upper = (bits + 0x8000) >> 16
    rest = bits - (upper << 16)
    correction.copy_(rest >> 8 if correction.dtype == torch.int8 else rest)
    param.view(torch.int16).copy_(_as_int16(upper))
    return bits.to(torch.int32).view(torch.float32)


def _as_int16(bits: Tensor) -> Tensor:
    bits = bits & 0xFFFF
    return torch.where(bits >= 0x8000, bits - 0x10000, bits).to(torch.int16)
