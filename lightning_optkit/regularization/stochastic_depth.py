# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth: residual branches are dropped at random, later ones more often.

Source: Huang et al. 2016, "Deep Networks with Stochastic Depth", arXiv:1603.09382, Section 3, Equation 4.
Unlike the paper, examples are dropped independently, and kept ones are scaled up in training instead of down in
evaluation, as in current dropout.
"""

from torch import Tensor

from lightning_optkit._checks import check_in, check_int, check_tensor, check_whole
from lightning_optkit.layers.drop_path import drop_samples

__all__ = ["linear_drop_rates", "stochastic_depth"]


def linear_drop_rates(num_blocks: int, p: float = 0.5) -> list[float]:
    r"""The linear decay rule: :math:`p_l = \frac{l}{L} p` for the blocks :math:`l = 1, \dots, L`.

    Early blocks are almost always kept, since all later ones build on them; the last one is dropped with probability
    `p`.

    Args:
        num_blocks: L, in [1, inf).
        p: Drop rate of the last block, in [0, 1); 0.5 in the paper.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> linear_drop_rates(4, p=0.5)
        [0.125, 0.25, 0.375, 0.5]
    """
    check_int("linear_drop_rates", "num_blocks", num_blocks, minimum=1)
    check_in("linear_drop_rates", "p", p, "[0, 1)")
    return [p * (block + 1) / num_blocks for block in range(num_blocks)]


def stochastic_depth(branch: Tensor, p: float, batch_dim: int = 0) -> Tensor:
    r"""Zeroes a residual branch for a random fraction `p` of the examples; the others are times 1 / (1 - p).

    Args:
        branch: The tensor that is added to the residual stream.
        p: Drop rate, in [0, 1).
        batch_dim: Dimension of the examples.

    Raises:
        ValueError: if an argument is out of range.

    Cost: one random number per example, a read and a write of the branch.

    Example:
        >>> import torch
        >>> stochastic_depth(torch.ones(2, 3), p=0.0)
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    check_tensor("stochastic_depth", "branch", branch, "inexact")
    p = check_in("stochastic_depth", "p", p, "[0, 1)")
    check_whole("stochastic_depth", "batch_dim", batch_dim)
    if not -branch.dim() <= batch_dim < branch.dim():
        raise ValueError(f"stochastic_depth(batch_dim={batch_dim}): the branch has {branch.dim()} dimensions.")
    if p == 0:
        return branch
    return drop_samples(branch, p, batch_dim)
