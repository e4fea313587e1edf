# SPDX-License-Identifier: Apache-2.0
"""Random rotations of images about their center.

Source: names as `torchvision.transforms.RandomRotation` (expand=False).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_optkit._checks import check_in, check_numbers, check_one_of
from lightning_optkit.data._draws import Draws
from lightning_optkit.data._images import check_image_batch, in_dtype, in_format

__all__ = ["RandomRotation"]


class RandomRotation(nn.Module):
    """Rotates each image counterclockwise by an independent angle, uniform in an interval.

    In evaluation mode images are returned unchanged.

    Args:
        degrees: Ends of the interval of angles (degrees), in (-inf, inf); one number d, in [0, inf), means (-d, d).
        interpolation: "nearest" or "bilinear".
        fill: Value of pixels from outside the image.
        generator: CPU generator of the draws. Default: a new one seeded with 0; give each process its own.

    Raises:
        TypeError: if images are not a real tensor.
        ValueError: if an argument is outside its range, or images are not (N, C, H, W).

    Cost: two new batches and a grid (N, H, W, 2), in float32 (float64 for float64 images).

    Example:
        >>> RandomRotation((90.0, 90.0))(torch.tensor([[[[1, 2], [3, 4]]]]))
        tensor([[[[2, 4],
                  [1, 3]]]])
    """

    def __init__(
        self,
        degrees: float | tuple[float, float],
        *,
        interpolation: Literal["nearest", "bilinear"] = "nearest",
        fill: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if isinstance(degrees, tuple | list):
            low, high = check_numbers(type(self).__name__, "degrees", degrees, 2, "(-inf, inf)")
        else:
            high = check_in(type(self).__name__, "degrees", degrees, "[0, inf)")
            low = -high
        if low > high:
            raise ValueError(f"{type(self).__name__}(degrees={degrees}): the first end must not exceed the second.")
        check_in(type(self).__name__, "fill", fill, "(-inf, inf)")
        check_one_of(type(self).__name__, "interpolation", interpolation, ("nearest", "bilinear"))
        self.degrees, self.interpolation, self.fill = (low, high), interpolation, fill
        self.draws = Draws(type(self).__name__, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Rotated images, shape (N, C, H, W), any real dtype; dtype and memory format kept."""
        if not self.training:
            return images
        check_image_batch(type(self).__name__, images)
        dtype = torch.float64 if images.dtype in (torch.float64, torch.int64, torch.int32) else torch.float32
        low, high = self.degrees
        angle = self.draws.uniform(len(images), low=low, high=high).deg2rad()
        cos, sin = (part.to(images.device, dtype) for part in (angle.cos(), angle.sin()))
        grid = _grid(cos, sin, images.shape[2], images.shape[3])
        shifted = images.to(dtype) - self.fill  # grid_sample pads with 0, which then means `fill`
        rotated = F.grid_sample(shifted, grid, mode=self.interpolation, padding_mode="zeros", align_corners=False)
        return in_format(in_dtype(rotated + self.fill, images), images)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"degrees={self.degrees}, interpolation={self.interpolation!r}, fill={self.fill}"


def _grid(cos: Tensor, sin: Tensor, height: int, width: int) -> Tensor:
    """Source of each output pixel, (N, H, W, 2), as (x, y) in [-1, 1]; `cos` and `sin` (N,) of the angles."""
    below, right = (torch.arange(n, dtype=cos.dtype, device=cos.device) - (n - 1) / 2 for n in (height, width))
    y, x = below[None, :, None], right[None, None, :]  # pixel offsets from the center
    cos, sin = cos[:, None, None], sin[:, None, None]
    return torch.stack([(x * cos - y * sin) * (2 / width), (x * sin + y * cos) * (2 / height)], dim=-1)
