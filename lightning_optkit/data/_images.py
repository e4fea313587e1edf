# SPDX-License-Identifier: Apache-2.0
"""What the image augmentations share: checks and the memory format."""

import torch
from torch import Tensor

__all__ = ["check_image_batch", "in_dtype", "in_format"]


def check_image_batch(owner: str, images: Tensor) -> None:
    """Passes if `images` is a real tensor of shape (N, C, H, W).

    Raises:
        TypeError: if it is not a real tensor.
        ValueError: if it has other dimensions or an empty image.
    """
    if not isinstance(images, Tensor) or images.is_complex():
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{owner}(images={found}): images must be a real tensor.")
    if images.dim() != 4 or images.shape[2:].numel() == 0:
        raise ValueError(f"{owner}(images.shape={tuple(images.shape)}): images must be (N, C, H, W), not empty.")


def in_format(result: Tensor, images: Tensor) -> Tensor:
    """`result` laid out in memory as `images`: channels last or contiguous."""
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return result.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def in_dtype(result: Tensor, images: Tensor) -> Tensor:
    """`result` in the dtype of `images`, rounded and cut to its range if that is an integer."""
    if images.is_floating_point():
        return result.to(images.dtype)
    if images.dtype == torch.bool:
        return result > 0.5
    limits = torch.iinfo(images.dtype)
    return result.round().clamp(limits.min, limits.max).to(images.dtype)
