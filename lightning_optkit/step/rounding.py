# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding to 16 bits: unbiased, so small updates survive on average. Same bits as the compiled path.

Source: Croci et al. 2022, "Stochastic rounding: implementation, error analysis and applications", section 2;
bits from a counter, as in csrc/core/random.h.
"""

import torch
from torch import Tensor

__all__ = ["AVERAGE", "move_average_", "random_bits", "round_stochastically"]

AVERAGE = 4
"""The average of the parameters, as the index of a state."""

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def random_bits(
    count: int, seed: int, step: int, tensor_index: int, device: torch.device, *, state: int | None = None
) -> Tensor:
    """32 random bits per element, as int64, in the bit order of the parameter or of one of its states."""
    key = _splitmix64((_splitmix64((_splitmix64(seed & _MASK64) + step) & _MASK64) + tensor_index) & _MASK64)
    word = torch.arange((count + 1) // 2, dtype=torch.int64, device=device)
    x = (word + (key & _MASK32)) & _MASK32
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK32
    x = x ^ (x >> 15) ^ (key >> 32) ^ (word >> 32)
    x = (x * 0x846CA68B) & _MASK32
    x = x ^ (x >> 16)
    bits = torch.stack([x, _rotated(x, 16)], -1).flatten()[:count]  # neighbors share a word
    return bits if state is None else _rotated(bits, 8 * (state + 1) if state < 3 else 4 if state == 3 else 12)


def _rotated(word: Tensor, left: int) -> Tensor:
    return ((word << left) & _MASK32) | (word >> (32 - left))


def round_stochastically(
    value: Tensor,
    dtype: torch.dtype,
    seed: int,
    step: int,
    tensor_index: int,
    *,
    state: int | None = None,
) -> Tensor:
    """Rounds fp32 `value` stochastically to bf16 or fp16.

    Args:
        value: fp32, dense; elements are numbered in storage order.
        dtype: torch.bfloat16 or torch.float16.
        seed: Seed of the run.
        step: Optimizer step, from 1.
        tensor_index: Number of the parameter.
        state: Index of the state that `value` is, in its rule, or `AVERAGE`; None for the parameter itself.

    Example:
        >>> between = torch.full((30000,), 1 + 2**-7 / 3)  # a third of the way to the next bf16 number
        >>> rounded = round_stochastically(between, torch.bfloat16, seed=0, step=1, tensor_index=0)
        >>> bool((rounded.float().mean() - between.mean()).abs() < 1e-4)
        True
    """
    value = value.float()
    bits = value.view(torch.int32).to(torch.int64) & _MASK32
    random = random_bits(value.numel(), seed, step, tensor_index, value.device, state=state)
    random = random.as_strided(value.shape, value.stride())
    chosen = _cut_to_bfloat16(bits, random) if dtype == torch.bfloat16 else _cut_to_float16(value, bits, random)
    signed = torch.where(chosen >= 2**31, chosen - 2**32, chosen)
    return signed.to(torch.int32).view(torch.float32).to(dtype)


def move_average_(average: Tensor, value: Tensor, weight: float | Tensor, key: tuple[int, int, int]) -> None:
    """`average <- average + weight * (value - average)`, in place; in 16 bits rounded stochastically.

    Args:
        average: Of the shape of `value`, in its dtype or one with fewer or more bits.
        value: The newest value.
        weight: Its weight, in [0, 1]; the number 1 copies, whatever the average holds.
        key: Seed, step and number of the parameter.
    """
    is_narrow = average.dtype in (torch.bfloat16, torch.float16)
    before = average.float() if is_narrow else average
    value = value.to(before.dtype)
    moved = value if isinstance(weight, float) and weight == 1 else before + weight * (value - before)
    average.copy_(round_stochastically(moved, average.dtype, *key, state=AVERAGE) if is_narrow else moved)


def _cut_to_bfloat16(bits: Tensor, random: Tensor) -> Tensor:
    noise = torch.where((bits & 0x7FFFFFFF) >= 0x7F800000, 0, random >> 16)
    cut = (bits + noise) & 0xFFFF0000
    return torch.where((bits & 0x7FFFFFFF) > 0x7F800000, bits, cut)


def _cut_to_float16(value: Tensor, bits: Tensor, random: Tensor) -> Tensor:
    magnitude, sign = bits & 0x7FFFFFFF, bits & 0x80000000
    exponent = magnitude >> 23
    shift = torch.where(exponent >= 113, 13, (126 - exponent).clamp(max=24))
    cut = ((bits + (random >> (32 - shift))) >> shift) << shift
    uniform = (random >> 8).float() * 2.0**-24
    tiny = torch.where(uniform < value.abs() * 2.0**24, sign | 0x33800000, sign)
    cut = torch.where(exponent < 103, tiny, cut)
    return torch.where(magnitude >= 0x477FE000, bits, cut)
