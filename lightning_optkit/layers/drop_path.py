# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth: whole samples of a residual branch are dropped.

Source: Huang, Sun, Liu, Sedra & Weinberger 2016, "Deep Networks with Stochastic Depth" (arXiv 1603.09382). Differs:
samples are drawn independently, and kept ones are scaled up in training; the paper scales down at test time.
"""

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_in, check_tensor

__all__ = ["DropPath", "drop_samples"]


def drop_samples(x: Tensor, p: float, dim: int = 0) -> Tensor:
    """Zeroes each sample along `dim` of `x` with probability `p`, and multiplies the others by 1 / (1 - p).

    Args:
        x: A tensor with at least one dimension.
        p: Probability that a sample is dropped, in [0, 1].
        dim: Dimension of the samples.

    Example:
        >>> drop_samples(torch.ones(2, 3), p=1.0)
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
    """
    keep = 1.0 - p
    shape = [1] * x.dim()
    shape[dim] = x.shape[dim]
    # In float32 for any x: 16 bits are too coarse for a small probability.
    survives = torch.rand(shape, dtype=torch.float32, device=x.device) < keep
    # Scaled before the select: one rounding in 16 bits, and a dropped infinity becomes 0.
    return torch.where(survives, x / keep if keep > 0.0 else x, 0.0)


class DropPath(nn.Module):
    """Zeroes the branch of a sample with probability `p`, independently per sample, and scales the others by 1/(1-p).

    Put it at the end of a residual branch: `x + drop_path(branch(x))`. In evaluation mode, and for `p=0`, it returns
    the input. Uses torch's generator of the input's device.

    Args:
        p: Probability that a sample is dropped, in [0, 1]. May be changed at any time; `drop_prob` is an alias.

    Raises:
        TypeError: if `p` is not a number.
        ValueError: if `p` is out of range; in `forward`, if the input has no batch dimension.

    Example:
        >>> x = torch.ones(1000, 3)
        >>> sorted(DropPath(0.5)(x).unique().tolist())
        [0.0, 2.0]
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = check_in(
            type(self).__name__, "p", p, "[0, 1]"
        )  # checked here: nn.Module would register a module passed by mistake

    @property
    def p(self) -> float:
        """Probability that a sample is dropped."""
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        self._p = check_in(type(self).__name__, "p", value, "[0, 1]")

    @property
    def drop_prob(self) -> float:
        """Alias of `p`, the name used by image models."""
        return self._p

    @drop_prob.setter
    def drop_prob(self, value: float) -> None:
        self._p = check_in(type(self).__name__, "drop_prob", value, "[0, 1]")

    def forward(self, x: Tensor) -> Tensor:
        """Zeroes whole samples of `x`, which has shape (samples, ...)."""
        if not self.training or self._p == 0.0:
            return x
        check_tensor(type(self).__name__, "x", x, "inexact")
        if x.dim() == 0:
            raise ValueError(f"{type(self).__name__}(x.shape=()): the first dimension of x must be the samples.")
        return drop_samples(x, self._p)

    def extra_repr(self) -> str:
        """The probability, for `repr`."""
        return f"p={self._p}"
