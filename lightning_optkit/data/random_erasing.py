# SPDX-License-Identifier: Apache-2.0
"""Random erasing: replaces a rectangle of every image by a constant or by noise.

Source: Zhong et al. 2020, arXiv:1708.04896; names as `torchvision.transforms.RandomErasing`.
Unlike the paper, and as in torchvision, the aspect ratio is log-uniform, and ten rectangles are tried.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_in, check_numbers, shown
from lightning_optkit.data._draws import Draws
from lightning_optkit.data._images import check_image_batch, in_dtype, in_format

__all__ = ["RandomErasing"]

_ATTEMPTS = 10


class RandomErasing(nn.Module):
    """Erases one rectangle of each image with probability `p`; rectangles are independent.

    In evaluation mode images are returned unchanged.

    Args:
        p: Probability that an image is changed, in [0, 1].
        scale: Smallest and largest area of the rectangle as a fraction of the image, in (0, 1].
        ratio: Smallest and largest height / width of the rectangle, in (0, inf).
        value: The replacement: a number, or "random" for standard normal noise per pixel.
        generator: CPU generator of the draws. Default: a new one seeded with 0; give each process its own.

    Raises:
        TypeError: if images are not a real tensor.
        ValueError: if an argument is outside its range, or images are not (N, C, H, W).

    Cost: one new batch and one mask (N, 1, H, W); with "random" a batch of noise.

    Example:
        >>> erased = RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0))(torch.ones(2, 3, 8, 8))
        >>> erased.mean(dim=(1, 2, 3))
        tensor([0.7500, 0.7500])
    """

    def __init__(
        self,
        p: float = 0.5,
        scale: tuple[float, float] = (0.02, 0.33),
        ratio: tuple[float, float] = (0.3, 3.3),
        value: float | Literal["random"] = 0.0,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.p = check_in(type(self).__name__, "p", p, "[0, 1]")
        for name, ends, interval in (("scale", scale, "(0, 1]"), ("ratio", ratio, "(0, inf)")):
            low, high = check_numbers(type(self).__name__, name, ends, 2, interval)
            if low > high:
                raise ValueError(f"{type(self).__name__}({name}={ends}): the first end must not exceed the second.")
        if isinstance(value, str) and value != "random":
            raise ValueError(f"{type(self).__name__}(value={shown(value)}): value must be a number or 'random'.")
        if not isinstance(value, str):
            check_in(type(self).__name__, "value", value, "(-inf, inf)")
        self.scale, self.ratio, self.value = scale, ratio, value
        self.draws = Draws(type(self).__name__, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Images with erased rectangles, shape (N, C, H, W); dtype and memory format kept."""
        if not self.training:
            return images
        check_image_batch(type(self).__name__, images)
        rows, columns = (span.to(images.device) for span in self._rectangles(images))
        mask = rows & columns
        if self.value == "random":
            noise = self.draws.normal_like(images if images.is_floating_point() else images.float())
            return in_format(torch.where(mask, in_dtype(noise, images), images), images)
        return in_format(images.masked_fill(mask, self.value), images)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"p={self.p}, scale={self.scale}, ratio={self.ratio}, value={self.value!r}"

    def _rectangles(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (N, 1, H, 1) and columns (N, 1, 1, W) to erase."""
        num, _, height, width = images.shape
        area = self.draws.uniform(_ATTEMPTS, num, low=self.scale[0], high=self.scale[1]) * (height * width)
        log_ratio = self.draws.uniform(_ATTEMPTS, num, low=math.log(self.ratio[0]), high=math.log(self.ratio[1]))
        heights, widths = (area * log_ratio.exp()).sqrt().round(), (area / log_ratio.exp()).sqrt().round()
        fits = (heights < height) & (widths < width)
        attempt = fits.to(torch.uint8).argmax(dim=0, keepdim=True)  # the first that fits
        erased = fits.any(dim=0) & (self.draws.uniform(num) < self.p)
        row = self._span(heights.gather(0, attempt)[0], height)
        column = self._span(widths.gather(0, attempt)[0], width)
        return (row & erased[:, None])[:, None, :, None], column[:, None, None, :]

    def _span(self, length: Tensor, size: int) -> Tensor:
        start = (self.draws.uniform(len(length)) * (size - length + 1)).floor()
        place = torch.arange(size)
        return (place >= start[:, None]) & (place < (start + length)[:, None])
