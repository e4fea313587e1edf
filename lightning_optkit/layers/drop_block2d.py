# SPDX-License-Identifier: Apache-2.0
"""Dropout of whole squares of a feature map.

Source: Ghiasi, Lin & Le 2018, "DropBlock: A regularization method for convolutional networks" (arXiv 1810.12890),
with a mask per channel.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_optkit._checks import check_in, check_int, check_tensor

__all__ = ["DropBlock2d"]


class DropBlock2d(nn.Module):
    """Zeroes squares of each channel, and multiplies the rest by (number of elements) / (number of kept elements).

    About a fraction `p` of the elements is dropped, somewhat less since squares may overlap. In evaluation mode, and
    for `p=0`, it returns the input.

    Args:
        p: Fraction to drop, in [0, 1). May be changed at any time; the paper increases it linearly from 0.
        block_size: Side of the squares, >= 1; limited by the smaller side of the feature map.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range; in `forward`, if the input does not have four dimensions.

    Example:
        >>> y = DropBlock2d(0.1, block_size=3)(torch.ones(8, 16, 14, 14))
        >>> round(float(y.mean()), 3)
        1.0
    """

    def __init__(self, p: float = 0.1, block_size: int = 7) -> None:
        super().__init__()
        self.p = check_in(
            type(self).__name__, "p", p, "[0, 1)"
        )  # checked here: nn.Module would register a module passed by mistake
        self.block_size = check_int(type(self).__name__, "block_size", block_size, minimum=1)

    @property
    def p(self) -> float:
        """Fraction to drop."""
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        self._p = check_in(type(self).__name__, "p", value, "[0, 1)")

    def forward(self, x: Tensor) -> Tensor:
        """Zeroes squares of `x`, which has shape (samples, channels, height, width)."""
        check_tensor(type(self).__name__, "x", x, "floating")
        if x.dim() != 4:
            raise ValueError(
                f"{type(self).__name__}(x.shape={tuple(x.shape)}): x must have the dimensions samples, channels, "
                "height, width."
            )
        if not self.training or self._p == 0.0 or x.numel() == 0:
            return x
        height, width = x.shape[-2:]
        side = min(self.block_size, height, width)
        places = (height - side + 1) * (width - side + 1)
        gamma = self._p * height * width / (side * side * places)
        # A seed is the corner of a square; seeds are drawn only where the whole square fits.
        seeds = torch.rand(*x.shape[:2], height - side + 1, width - side + 1, device=x.device) < gamma
        border = side - 1
        dropped = F.max_pool2d(F.pad(seeds.float(), [border] * 4), side, stride=1) > 0
        kept = (~dropped).sum().clamp_min(1).to(torch.float32 if x.dtype.itemsize == 2 else x.dtype)
        scale = dropped.numel() / kept  # 0-d, so that the dtype of x is kept
        return torch.where(dropped, 0.0, x * scale)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"p={self._p}, block_size={self.block_size}"
