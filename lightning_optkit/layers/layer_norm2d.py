# SPDX-License-Identifier: Apache-2.0
"""Layer normalization of the channels of images, as in ConvNeXt.

Source: Ba, Kiros & Hinton 2016, "Layer Normalization" (arXiv 1607.06450), equation 3, at each place of the image;
Liu et al. 2022, "A ConvNet for the 2020s" (arXiv 2201.03545).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_optkit._checks import check_bools, check_int
from lightning_optkit.layers._arguments import check_images
from lightning_optkit.layers.layer_norm import LayerNorm

__all__ = ["LayerNorm2d"]


class LayerNorm2d(LayerNorm):
    """`LayerNorm` over the channels of (N, C, H, W), read where they lie.

    Results, gradients and state dict are those of timm's layer of this name: `layer_norm` of the input with the
    channels last, put first again. Images in either memory format are read without a copy. The result is in
    channels-last format, as with timm.

    Args:
        num_channels: C, at least 1.
        eps: Added to the variance.
        affine: Learn a weight and a bias per channel.
        device: Device of the parameters.
        dtype: Dtype of the parameters; 16-bit inputs also allow float32 parameters.

    Raises:
        TypeError: if `num_channels` is not an integer.
        ValueError: if it is smaller than 1; in `forward`, if shape, dtype or device of the input do not fit.

    Example:
        >>> LayerNorm2d(4)(torch.ones(2, 4, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_int(type(self).__name__, "num_channels", num_channels, minimum=1)
        check_bools(type(self).__name__, affine=affine)
        super().__init__(num_channels, eps, affine, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Returns the normalized images."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            rows = F.layer_norm(input.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
            return rows.permute(0, 3, 1, 2)
        return self._images(input)

    @torch.jit.unused
    def _images(self, input: Tensor) -> Tensor:
        check_images(type(self).__name__, input, self.normalized_shape[0])
        return self._normalized(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
