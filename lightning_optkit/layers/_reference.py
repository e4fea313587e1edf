# SPDX-License-Identifier: Apache-2.0
"""The formulas in plain torch: used without the extension, and for double backward."""

import torch
from torch import Tensor

__all__ = ["norm_backward_reference", "norm_reference", "survival"]


def norm_reference(
    centered: bool, input: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float | None
) -> Tensor:
    """Torch's own kernel."""
    sizes = input.shape[input.dim() - dims :]
    if centered:
        return torch.layer_norm(input, sizes, weight, bias, eps)  # type: ignore[arg-type]
    return torch.rms_norm(input, sizes, weight, eps)


def norm_backward_reference(
    centered: bool,
    dy: Tensor,
    d_sum: Tensor | None,
    input: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    alive: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (normalized input, input before dropout, weight, bias), differentiable."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    row = tuple(range(input.dim() - dims, input.dim()))
    rows = tuple(range(input.dim() - dims))
    x, d = input.to(wide), dy.to(wide)
    if centered:
        x = x - x.mean(row, keepdim=True)
    rstd = (x.square().mean(row, keepdim=True) + eps).rsqrt()
    normalized = x * rstd
    g = d if weight is None else d * weight.to(wide)
    dx = g - normalized * (g * normalized).mean(row, keepdim=True)
    if centered:
        dx = dx - g.mean(row, keepdim=True)
    dx = dx * rstd
    if d_sum is not None:
        dx = dx + d_sum.to(wide)
    d_weight, d_bias = (d * normalized, d)
    if rows:
        d_weight, d_bias = d_weight.sum(rows), d_bias.sum(rows)
    stored = input.dtype if weight is None else weight.dtype
    d_input = dx if alive is None else torch.where(alive > 0, dx * alive, 0.0)
    return dx.to(input.dtype), d_input.to(input.dtype), d_weight.to(stored), d_bias.to(stored)


def survival(like: Tensor, dropout: float, seed: Tensor | int) -> Tensor:
    """1 / (1 - dropout) for kept elements, else 0; from the random bits of csrc/norms/tables.h."""
    keep_below = min(int((1.0 - dropout) * 2**32), 2**32 - 1)
    scale = 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0
    key = _splitmix64(_splitmix64(_splitmix64(int(seed))))
    place = torch.arange(like.numel(), device=like.device)
    bits = _lowbias32(_lowbias32(((place & _LOW) + (key & _LOW)) & _LOW) ^ (place >> 32) ^ (key >> 32))
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    # The kernels store the scale in fp32, whatever the dtype.
    factor = torch.tensor(scale, dtype=torch.float32, device=like.device).to(wide)
    return torch.where(bits < keep_below, factor, torch.zeros((), dtype=wide, device=like.device)).view(like.shape)


_LOW = 0xFFFFFFFF


def _splitmix64(x: int) -> int:
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def _lowbias32(x: Tensor) -> Tensor:
    # Products overflow int64, but their low 32 bits are correct.
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _LOW
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _LOW
    return x ^ (x >> 16)
