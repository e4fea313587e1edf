# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth: whole samples of a residual branch are dropped.

Source: Huang, Sun, Liu, Sedra & Weinberger 2016, "Deep Networks with Stochastic Depth" (arXiv 1603.09382). Differs:
each sample draws for itself, and the survivors are scaled up in training, where the paper scales down at test time.
"""

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_in, check_tensor

__all__ = ["DropPath", "drop_samples"]


def drop_samples(x: Tensor, p: float, dim: int = 0) -> Tensor:
    """`x` with each sample along `dim` zeroed with probability `p`, and the others times 1 / (1 - p).

    Args:
        x: Has at least one dimension.
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
    # In float32 whatever x is: 16 bits have too few steps for a small probability.
    survives = torch.rand(shape, dtype=torch.float32, device=x.device) < keep
    # Scaled before the choice: one rounding in 16 bits, and a dropped infinity is 0.
    return torch.where(survives, x / keep if keep > 0.0 else x, 0.0)


class DropPath(nn.Module):
    """Zeroes the branch of a sample with probability `p`, independently per sample, and scales the rest by 1/(1-p).

    Put it at the end of a residual branch: `x + drop_path(branch(x))`. In evaluation mode, and for `p=0`, the input
    comes back as it is. Draws come from torch's generator of the input's device.

    Args:
        p: Probability that a sample is dropped, in [0, 1]. May be changed at any time; `drop_prob` is the same.

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
        )  # here: a module, given by mistake, would not reach the setter

    @property
    def p(self) -> float:
        """Probability that a sample is dropped."""
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        self._p = check_in(type(self).__name__, "p", value, "[0, 1]")

    @property
    def drop_prob(self) -> float:
        """`p` under the name that image models use."""
        return self._p

    @drop_prob.setter
    def drop_prob(self, value: float) -> None:
        self._p = check_in(type(self).__name__, "drop_prob", value, "[0, 1]")

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape (samples, ...), whole samples of it zeroed."""
        if not self.training or self._p == 0.0:
            return x
        check_tensor(type(self).__name__, "x", x, "inexact")
        if x.dim() == 0:
            raise ValueError(f"{type(self).__name__}(x.shape=()): the first dimension of x must be the samples.")
        return drop_samples(x, self._p)

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self._p}"
