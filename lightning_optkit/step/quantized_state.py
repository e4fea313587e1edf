# SPDX-License-Identifier: Apache-2.0
"""State in 8 bits, in plain PyTorch: bitwise the same codes as csrc/core/quantized_state.h.

Each block of 128 numbers shares one scale, its largest magnitude. A number is stored relative to the scale with 3
fraction bits: signed state down to 2^-15 of the scale, nonnegative state down to 2^-31. Rounding is stochastic, so the
relative error of one number is at most 1/8 and its mean is zero; a nonzero square never becomes zero.

Inf and NaN have no code and are excluded from the scale, so that they do not destroy their block: they become zero in
signed state, and the largest code of the block in nonnegative state.
"""

import torch
from torch import Tensor

from lightning_optkit.step.rounding import random_bits

__all__ = ["BLOCK", "dequantize8", "quantize8_", "scale_name", "zero_scales"]

BLOCK = 128
_MAX = 1.875
# Within these bounds a scale and its reciprocal are normal numbers. Larger numbers saturate; smaller blocks become
# zero.
_LEAST_SCALE, _MOST_SCALE = 2.0**-125, 2.0**126


def scale_name(name: str) -> str:
    """The state name of the scales of state `name`."""
    return f"{name}_scale"


def zero_scales(codes: Tensor) -> Tensor:
    """Zero scales for `codes`: fp32, shape (blocks,)."""
    return torch.zeros(-(-codes.numel() // BLOCK), dtype=torch.float32, device=codes.device)


def dequantize8(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The values of `codes`: fp32, with the same shape and strides.

    Args:
        codes: uint8, dense; blocks follow storage order.
        scales: fp32, shape (blocks,).
        signed: Whether the first bit is a sign.
    """
    code = _flat(codes).to(torch.int32)
    magnitude = code & 127 if signed else code
    value = ((magnitude + ((112 if signed else 96) << 3)) << 20).view(torch.float32)
    if signed:
        value = torch.where(code >= 128, -value, value)
    factor = torch.where(scales.isfinite(), scales, 0.0) / _MAX
    value = torch.where(magnitude == 0, 0.0, value) * _per_element(factor, code.numel())
    return value.as_strided(codes.shape, codes.stride())


def quantize8_(
    codes: Tensor, scales: Tensor, value: Tensor, *, signed: bool, key: tuple[int, int, int, int] | None
) -> None:
    """Quantizes `value` into `codes` and `scales`.

    Args:
        codes: uint8, dense; overwritten.
        scales: fp32, shape (blocks,); overwritten.
        value: fp32, with the shape and strides of `codes`.
        signed: Whether the first bit is a sign.
        key: Seed, optimizer step, parameter number, state number: they determine the random bits. None: rounded to
            nearest, so that values that were quantized before keep their codes.
    """
    flat = _flat(value.to(torch.float32))
    scales.copy_(_scales(flat, scales.numel()))
    # The reciprocal first, as in the compiled code, so that the product is bitwise equal.
    factor = torch.where(scales > 0, _MAX / scales, 0.0)
    scaled = flat * _per_element(factor, flat.numel())
    offset = (112 if signed else 96) << 3
    magnitude = scaled.abs().contiguous().view(torch.int32).to(torch.int64)
    half = torch.full_like(magnitude, 1 << 19)
    noise = half if key is None else random_bits(flat.numel(), *key[:3], flat.device, state=key[3]) >> 12
    rounded = ((magnitude + noise) >> 20) - offset
    inside = rounded.clamp(1, 127 if signed else 255)
    least = 1.125 * 2.0 ** (-15 if signed else -31)
    small = (noise.to(torch.float32) * (2.0**-20 * least) < scaled.abs()) if signed else (scaled > 0)
    code = torch.where(scaled.abs() < least, small.to(torch.int64), inside)
    if signed:
        code = torch.where(scaled.isfinite(), code, 0)
        code = torch.where((code != 0) & (scaled < 0), code | 128, code)
    _flat(codes).copy_(code.to(torch.uint8))


def _scales(flat: Tensor, num_blocks: int) -> Tensor:
    """The scale of each block: its largest finite magnitude, clamped to the valid range."""
    if num_blocks == 0:
        return flat.new_zeros(0)
    magnitude = torch.where(flat.isfinite(), flat.abs(), 0.0)
    largest = torch.nn.functional.pad(magnitude, (0, num_blocks * BLOCK - flat.numel())).view(-1, BLOCK).amax(1)
    return torch.where(largest < _LEAST_SCALE, 0.0, largest.clamp(max=_MOST_SCALE))


def _flat(dense: Tensor) -> Tensor:
    """The elements of a tensor without gaps, in storage order."""
    return dense.as_strided((dense.numel(),), (1,))


def _per_element(per_block: Tensor, count: int) -> Tensor:
    return per_block.repeat_interleave(BLOCK)[:count]
