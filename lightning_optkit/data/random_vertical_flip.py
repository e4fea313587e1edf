# SPDX-License-Identifier: Apache-2.0
"""Random top-bottom flips of images.

Source: names as `torchvision.transforms.RandomVerticalFlip`.
"""

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_in
from lightning_optkit.data._draws import Draws
from lightning_optkit.data._images import check_image_batch, in_format

__all__ = ["RandomVerticalFlip"]


class RandomVerticalFlip(nn.Module):
    """Mirrors each image with probability `p`, independently. In evaluation mode images are returned unchanged.

    Args:
        p: Probability that an image is mirrored, in [0, 1].
        generator: CPU generator of the draws. Default: a new one seeded with 0; give each process its own.

    Raises:
        TypeError: if images are not a real tensor.
        ValueError: if `p` is outside its range, or images are not (N, C, H, W).

    Cost: two new batches.

    Example:
        >>> RandomVerticalFlip(p=1.0)(torch.tensor([[[[1, 2], [3, 4]]]]))
        tensor([[[[3, 4],
                  [1, 2]]]])
    """

    def __init__(self, p: float = 0.5, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.p = check_in(type(self).__name__, "p", p, "[0, 1]")
        self.draws = Draws(type(self).__name__, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Images, some of them mirrored, shape (N, C, H, W), any real dtype; dtype and memory format kept."""
        if not self.training:
            return images
        check_image_batch(type(self).__name__, images)
        return in_format(torch.where(self.draws.chosen(images, self.p), images.flip(-2), images), images)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"p={self.p}"
