# SPDX-License-Identifier: Apache-2.0
"""Shared by the image augmentations: checks and the memory format."""

import torch
from torch import Tensor

from lightning_optkit._checks import check_int, check_tensor, shown

__all__ = ["check_image_batch", "check_sides", "in_dtype", "in_format"]


def check_image_batch(owner: str, images: Tensor, name: str = "images") -> None:
    """Raises unless `images` is a real tensor of shape (N, C, H, W).

    Raises:
        TypeError: if it is not a real tensor.
        ValueError: if it has other dimensions or an empty image.
    """
    check_tensor(owner, name, images, "real")
    if images.dim() != 4 or images.shape[2:].numel() == 0:
        raise ValueError(f"{owner}({name}.shape={tuple(images.shape)}): {name} must be (N, C, H, W), not empty.")


def check_sides(owner: str, size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width (pixels) of `size`, one number for both.

    Raises:
        TypeError: if it is neither an integer nor a pair of them.
        ValueError: if one is less than 1.
    """
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"{owner}(size={shown(size)}): size must be one integer or two, height and width.")
    height, width = (check_int(owner, "size", side, minimum=1) for side in sides)
    return height, width


def in_format(result: Tensor, images: Tensor) -> Tensor:
    """`result` in the memory format of `images`: channels last or contiguous."""
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return result.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def in_dtype(result: Tensor, images: Tensor) -> Tensor:
    """`result` in the dtype of `images`; rounded and clamped for integers."""
    if images.is_floating_point():
        return result.to(images.dtype)
    if images.dtype == torch.bool:
        return result > 0.5
    limits = torch.iinfo(images.dtype)
    return result.round().clamp(limits.min, limits.max).to(images.dtype)
