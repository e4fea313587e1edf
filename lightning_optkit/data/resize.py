# SPDX-License-Identifier: Apache-2.0
"""Resizes images.

Source: names as `torchvision.transforms.functional.resize`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_optkit._checks import check_bools, check_one_of
from lightning_optkit.data._images import check_image_batch, check_sides, in_dtype, in_format

__all__ = ["resize"]


def resize(
    images: Tensor,
    size: int | tuple[int, int],
    *,
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear",
    antialias: bool = True,
) -> Tensor:
    """Images resampled to `size`; dtype and memory format kept.

    Args:
        images: Shape (N, C, H, W), any real dtype; computed in float32 (float64 stays), integers are rounded.
        size: Height and width (pixels), in [1, inf); one number for the shorter side, keeping the aspect ratio.
        interpolation: "nearest", "bilinear" or "bicubic".
        antialias: Whether shrinking averages over all merged pixels; no effect for "nearest".

    Returns:
        Shape (N, C, height, width).

    Raises:
        TypeError: if images are not a real tensor.
        ValueError: if an argument is outside its range, or images are not (N, C, H, W).

    Example:
        >>> resize(torch.tensor([[[[0.0, 0.0, 4.0, 4.0]]]]), (1, 2))
        tensor([[[[0.5714, 3.4286]]]])
        >>> resize(torch.zeros(1, 3, 40, 60), 20).shape
        torch.Size([1, 3, 20, 30])
    """
    check_image_batch("resize", images)
    check_one_of("resize", "interpolation", interpolation, ("nearest", "bilinear", "bicubic"))
    check_bools("resize", antialias=antialias)
    sides = check_sides("resize", size)
    if isinstance(size, int):
        height, width = images.shape[2:]
        shorter = min(height, width)
        sides = (size * height // shorter, size * width // shorter)
    x = images if images.dtype == torch.float64 else images.to(torch.float32)
    if interpolation == "nearest":
        resized = F.interpolate(x, sides, mode="nearest-exact")
    else:
        resized = F.interpolate(x, sides, mode=interpolation, align_corners=False, antialias=antialias)
    return in_format(in_dtype(resized, images), images)
