# SPDX-License-Identifier: Apache-2.0
"""Crops a window of every image at a random position, after padding.

Source: names as `torchvision.transforms.RandomCrop`.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_in, check_int, check_one_of
from lightning_optkit.data._draws import Draws
from lightning_optkit.data._images import check_image_batch, check_sides, in_format

__all__ = ["RandomCrop"]


class RandomCrop(nn.Module):
    """Crops a window from each image; positions are independent, and uniform over all that fit.

    In evaluation mode images are returned unchanged, in their own size.

    Args:
        size: Height and width of the window (pixels), in [1, inf); one number for a square.
        padding: Pixels added on every side first, in [0, inf).
        fill: Value of the pixels that "constant" adds.
        padding_mode: The padding: `fill` ("constant"), the border pixel ("edge"), or the image mirrored at the border
            pixel ("reflect").
        generator: CPU generator of the draws. Default: a new one seeded with 0; give each process its own.

    Raises:
        TypeError: if images are not a real tensor.
        ValueError: if an argument is outside its range, images are not (N, C, H, W), or smaller than the window.

    Cost: one new batch; the padded images are never made.

    Example:
        >>> RandomCrop(32, padding=4)(torch.zeros(8, 3, 32, 32)).shape
        torch.Size([8, 3, 32, 32])
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        padding: int = 0,
        *,
        fill: float = 0.0,
        padding_mode: Literal["constant", "edge", "reflect"] = "constant",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.size = check_sides(type(self).__name__, size)
        self.padding = check_int(type(self).__name__, "padding", padding, minimum=0)
        check_one_of(type(self).__name__, "padding_mode", padding_mode, ("constant", "edge", "reflect"))
        check_in(type(self).__name__, "fill", fill, "(-inf, inf)")
        self.fill, self.padding_mode = fill, padding_mode
        self.draws = Draws(type(self).__name__, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Windows of the images, shape (N, C, height, width), any real dtype; dtype and memory format kept."""
        if not self.training:
            return images
        check_image_batch(type(self).__name__, images)
        num, channels, height, width = images.shape
        rows, columns = (
            self._places(num, full, side).to(images.device)
            for full, side in zip((height, width), self.size, strict=True)
        )
        window = images[
            torch.arange(num, device=images.device)[:, None, None, None],
            torch.arange(channels, device=images.device)[None, :, None, None],
            self._inside(rows, height)[:, None, :, None],
            self._inside(columns, width)[:, None, None, :],
        ]
        if self.padding and self.padding_mode == "constant":
            outside = ((rows < 0) | (rows >= height))[:, :, None] | ((columns < 0) | (columns >= width))[:, None, :]
            window = window.masked_fill(outside[:, None], self.fill)
        return in_format(window, images)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"size={self.size}, padding={self.padding}, fill={self.fill}, padding_mode={self.padding_mode!r}"

    def _places(self, num: int, full: int, side: int) -> Tensor:
        """Pixel numbers (N, side) of the windows along one dimension, negative or >= full in the padding."""
        room = full + 2 * self.padding - side
        if room < 0:
            raise ValueError(
                f"{type(self).__name__}(size={self.size}): must not exceed the padded image, {full} + 2 * "
                f"{self.padding} pixels."
            )
        if self.padding_mode == "reflect" and self.padding >= full:
            raise ValueError(
                f"{type(self).__name__}(padding={self.padding}): 'reflect' needs less than the image's {full} pixels."
            )
        start = torch.randint(room + 1, (num, 1), generator=self.draws.generator) - self.padding
        return start + torch.arange(side)

    def _inside(self, places: Tensor, full: int) -> Tensor:
        if self.padding_mode == "reflect":
            return full - 1 - (full - 1 - places.abs()).abs()
        return places.clamp(0, full - 1)
