# SPDX-License-Identifier: Apache-2.0
"""Normalization to a learned length.

Source: Nguyen & Salazar 2019, "Transformers without Tears: Improving the Normalization of Self-Attention"
(arXiv 1910.05895), initialized with the square root of the dimension.
"""

import math

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_home, check_in, check_int, check_tensor

__all__ = ["ScaleNorm"]


class ScaleNorm(nn.Module):
    """`scale * x / max(|x|, eps)` over the last dimension, with a single learned scale instead of a weight per feature.

    Args:
        dim: Size of the last dimension, >= 1.
        eps: Lower bound of the length in the denominator, in (0, inf).
        device: Device of the parameter.
        dtype: Dtype of the parameter. 16-bit inputs are normalized in float32.

    Raises:
        TypeError: if `dim` is not an integer.
        ValueError: if an argument is out of range; in `forward`, if the last dimension is not `dim`.

    Example:
        >>> ScaleNorm(4)(torch.tensor([[0.0, 3.0, 0.0, 4.0]]))
        tensor([[0.0000, 1.2000, 0.0000, 1.6000]], grad_fn=<MulBackward0>)
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = check_int(type(self).__name__, "dim", dim, minimum=1)
        self.eps = check_in(type(self).__name__, "eps", eps, "(0, inf)")
        check_home(type(self).__name__, device, dtype)
        # Shape (1,), since sharding refuses 0-d parameters.
        self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the scale to the square root of `dim`."""
        nn.init.constant_(self.scale, math.sqrt(self.dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes `x` of shape (..., dim); shape and dtype are kept."""
        check_tensor(type(self).__name__, "x", x, "floating")
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"{type(self).__name__}(x.shape={tuple(x.shape)}): the last dimension must be {self.dim}.")
        wide = x.float() if x.dtype.itemsize == 2 else x
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(self.eps)
        scaled: Tensor = wide * (self.scale.to(wide.dtype) / length)
        return scaled.to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"{self.dim}, eps={self.eps}"
