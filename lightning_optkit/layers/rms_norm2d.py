# SPDX-License-Identifier: Apache-2.0
"""Root mean square normalization of the channels of images.

Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv 1910.07467), at each place of the image.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_optkit._checks import check_bools, check_int
from lightning_optkit.layers._arguments import check_images
from lightning_optkit.layers.rms_norm import RMSNorm

__all__ = ["RMSNorm2d"]


class RMSNorm2d(RMSNorm):
    """`RMSNorm` over the channels of (N, C, H, W), read where they lie.

    `rms_norm` of the input with the channels last, put first again. Images in either memory format are read without a
    copy. The result is in channels-last format.

    Args:
        num_channels: C, at least 1.
        eps: Added to the mean square.
        affine: Learn a weight per channel.
        device: Device of the weight.
        dtype: Dtype of the weight; 16-bit inputs also allow a float32 weight.

    Raises:
        TypeError: if `num_channels` is not an integer.
        ValueError: if it is smaller than 1; in `forward`, if shape, dtype or device of the input do not fit.

    Example:
        >>> RMSNorm2d(4)(torch.ones(2, 4, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        num_channels: int,
        eps: float | None = 1e-6,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_int(type(self).__name__, "num_channels", num_channels, minimum=1)
        check_bools(type(self).__name__, affine=affine)
        super().__init__(num_channels, eps, affine, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalized images."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return F.rms_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.eps).permute(0, 3, 1, 2)
        return self._images(x)

    @torch.jit.unused
    def _images(self, x: Tensor) -> Tensor:
        check_images(type(self).__name__, x, self.normalized_shape[0])
        return self._normalized(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
