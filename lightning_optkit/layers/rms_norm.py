# SPDX-License-Identifier: Apache-2.0
"""Root mean square normalization.

Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_optkit._checks import check_bools, check_home
from lightning_optkit._torch_private import parameter
from lightning_optkit.layers._arguments import check_eps, check_norm, check_sizes
from lightning_optkit.layers._dispatch import run_norm

__all__ = ["RMSNorm", "rms_norm"]


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`input / sqrt(mean(input**2) + eps) * weight` over the last dimensions, like `F.rms_norm`.

    Args:
        input: Any shape that ends in `normalized_shape`, floating point.
        normalized_shape: Sizes of the dimensions that are normalized together.
        weight: Shape `normalized_shape`, in the dtype of `input`, or float32 for a 16-bit `input`.
        eps: Added to the mean square; None: that of the dtype torch computes in, float32 or float64.

    Raises:
        ValueError: if a shape, dtype or device does not fit.

    Example:
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), (2,), eps=0.0)
        tensor([[0.8485, 1.1314]])
    """
    try:
        return run_norm(False, input, normalized_shape, weight, None, eps)
    except Exception:
        check_norm("rms_norm", False, input, normalized_shape, weight, None, eps)
        raise


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`, with one pass over the rows for each of forward and backward.

    Same arguments, results and state dict. The gradient of the weight is summed in float32 for every dtype.

    Args:
        normalized_shape: Sizes of the last dimensions, normalized together; each >= 1.
        eps: Added to the mean square; None: that of the dtype torch computes in, float32 or float64.
        elementwise_affine: Learn a weight.
        device: Device of the weight.
        dtype: Dtype of the weight; 16-bit inputs also allow a float32 weight.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is smaller than 1; in `forward`, if shape, dtype or device of the input do not fit.

    Example:
        >>> RMSNorm(4)(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        owner = type(self).__name__
        sizes = check_sizes(owner, normalized_shape)
        check_eps(owner, eps, optional=True)
        check_bools(owner, elementwise_affine=elementwise_affine)
        check_home(owner, device, dtype)
        super().__init__(sizes, eps, elementwise_affine, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalized input."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return self._normalized(x)

    @torch.jit.unused
    def _normalized(self, x: Tensor) -> Tensor:
        try:
            return run_norm(False, x, self.normalized_shape, parameter(self, "weight"), None, self.eps)
        except Exception:
            owner = type(self).__name__
            check_norm(owner, False, x, self.normalized_shape, self.weight, None, self.eps)
            raise
