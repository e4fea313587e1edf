# SPDX-License-Identifier: Apache-2.0
"""Residual connection and root mean square normalization in one pass.

Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv 1910.07467); dropout: Srivastava
et al. 2014.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optkit._checks import check_in
from lightning_optkit._torch_private import parameter
from lightning_optkit.layers._arguments import check_norm
from lightning_optkit.layers._dispatch import run_add_norm
from lightning_optkit.layers.rms_norm import RMSNorm

__all__ = ["AddRMSNorm", "add_rms_norm"]


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    dropout: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """Normalizes the sum `dropout(input) + residual`; also returns the sum, which is the next residual.

    The dropout mask is never stored: it is a function of the position and of a seed from torch's default generator.

    Args:
        input: Output of a block, any shape that ends in `normalized_shape`, floating point.
        residual: Input of the block; same shape.
        normalized_shape: Sizes of the dimensions that are normalized together.
        weight: Shape `normalized_shape`, in the dtype of the sum, or float32 for a 16-bit sum.
        eps: Added to the mean square; None: that of the dtype torch computes in, float32 or float64.
        dropout: Probability of dropout of `input`, in [0, 1]; kept elements are scaled up.
        training: False: no dropout.

    Returns:
        (normalized sum, sum)

    Raises:
        ValueError: if a shape, dtype or device does not fit, or `dropout` is out of range.

    Example:
        >>> y, residual = add_rms_norm(torch.ones(2, 4), torch.ones(2, 4), (4,))
        >>> residual[0]
        tensor([2., 2., 2., 2.])
    """
    p = check_in("add_rms_norm", "dropout", dropout, "[0, 1]") if training else 0.0
    try:
        return run_add_norm(False, input, residual, normalized_shape, weight, None, eps, p)
    except Exception:
        check_norm("add_rms_norm", False, input, normalized_shape, weight, None, eps, residual)
        raise


class AddRMSNorm(RMSNorm):
    """`residual = dropout(x) + residual; y = norm(residual)` in one pass, the tail of a pre-norm transformer block.

    State dict of `torch.nn.RMSNorm`. `dropout` may be changed at any time, also by a schedule.

    Args:
        normalized_shape: Sizes of the last dimensions, normalized together; each >= 1.
        eps: Added to the mean square; None: that of the dtype torch computes in, float32 or float64.
        elementwise_affine: Learn a weight.
        device: Device of the parameters.
        dtype: Dtype of the parameters; 16-bit inputs also allow float32 parameters.
        dropout: Probability of dropout of `x` in training, in [0, 1].

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is smaller than 1 or `dropout` out of range; in `forward`, if shape, dtype or device of
            the inputs do not fit.

    Example:
        >>> y, residual = AddRMSNorm(4, dropout=0.1)(torch.ones(2, 4), torch.ones(2, 4))
        >>> y.shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device=device, dtype=dtype)
        self.dropout = check_in(
            type(self).__name__, "dropout", dropout, "[0, 1]"
        )  # checked here: nn.Module would register a module passed by mistake

    @property
    def dropout(self) -> float:
        """Probability of dropout of `x` in training."""
        return self._dropout

    @dropout.setter
    def dropout(self, value: float) -> None:
        self._dropout = check_in(type(self).__name__, "dropout", value, "[0, 1]")

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Returns (normalized sum, sum)."""
        p = self._dropout if self.training else 0.0
        try:
            weight = parameter(self, "weight")
            return run_add_norm(False, x, residual, self.normalized_shape, weight, None, self.eps, p)
        except Exception:
            owner = type(self).__name__
            check_norm(owner, False, x, self.normalized_shape, self.weight, None, self.eps, residual)
            raise

    def extra_repr(self) -> str:
        """That of torch, and the dropout."""
        return f"{super().extra_repr()}, dropout={self._dropout}"
