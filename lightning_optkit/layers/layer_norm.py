# SPDX-License-Identifier: Apache-2.0
"""Layer normalization.

Source: Ba, Kiros & Hinton 2016, "Layer Normalization" (arXiv 1607.06450), equation 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_optkit._checks import check_bools, check_home
from lightning_optkit._torch_private import parameter
from lightning_optkit.layers._arguments import check_eps, check_norm, check_sizes
from lightning_optkit.layers._dispatch import run_norm

__all__ = ["LayerNorm", "layer_norm"]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`(input - mean) / sqrt(variance + eps) * weight + bias` over the last dimensions, like `F.layer_norm`.

    Args:
        input: Any shape that ends in `normalized_shape`, floating point.
        normalized_shape: Sizes of the dimensions that are normalized together.
        weight: Shape `normalized_shape`, in the dtype of `input`, or float32 for a 16-bit `input`.
        bias: Same as `weight`.
        eps: Added to the variance.

    Raises:
        ValueError: if a shape, dtype or device does not fit.

    Example:
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), (2,), eps=0.0)
        tensor([[-1.,  1.]])
    """
    try:
        return run_norm(True, input, normalized_shape, weight, bias, eps)
    except Exception:
        check_norm("layer_norm", True, input, normalized_shape, weight, bias, eps)
        raise


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`, with one pass over the rows for each of forward and backward.

    Same arguments, results and state dict. The gradients of weight and bias are summed in float32 for every dtype:
    torch's CPU kernel sums them in the input's dtype, and stops at 256 in bfloat16. Without the compiled autograd node
    (`optkit info`), CPU inputs of at most 60000 elements in at most 256 rows use torch's kernel, which is faster there.

    Args:
        normalized_shape: Sizes of the last dimensions, normalized together; each >= 1.
        eps: Added to the variance.
        elementwise_affine: Learn a weight, and a bias.
        bias: Learn a bias, if there is a weight.
        device: Device of the parameters.
        dtype: Dtype of the parameters; 16-bit inputs also allow float32 parameters.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is smaller than 1; in `forward`, if shape, dtype or device of the input do not fit.

    Example:
        >>> LayerNorm(4)(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        owner = type(self).__name__
        sizes = check_sizes(owner, normalized_shape)
        check_eps(owner, eps, optional=False)
        check_bools(owner, elementwise_affine=elementwise_affine, bias=bias)
        check_home(owner, device, dtype)
        super().__init__(sizes, eps, elementwise_affine, bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Returns the normalized input."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return self._normalized(input)

    @torch.jit.unused
    def _normalized(self, input: Tensor) -> Tensor:
        try:
            weight, bias = parameter(self, "weight"), parameter(self, "bias")
            return run_norm(True, input, self.normalized_shape, weight, bias, self.eps)
        except Exception:
            owner = type(self).__name__
            check_norm(owner, True, input, self.normalized_shape, self.weight, self.bias, self.eps)
            raise
