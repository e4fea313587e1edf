# SPDX-License-Identifier: Apache-2.0
"""Sparse initialization: most weights zero, the rest large enough to matter.

Source: Martens 2010, "Deep learning via Hessian-free optimization", ICML.
Differs from the paper: as in torch, a share of each column is zero (connections leaving a unit), where Martens fixes
the number of connections that enter a unit.
"""

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_in
from lightning_optkit.init._tensor import check_tensor

__all__ = ["sparse"]


def sparse(
    tensor: Tensor, *, sparsity: float = 0.9, std: float = 0.01, generator: torch.Generator | None = None
) -> Tensor:
    """Fills `tensor` in place from N(0, std^2), sets a share of each column to zero, and returns it.

    The numbers are those of torch.nn.init.sparse_, which draws the places of the zeros from the global generator even
    when it is given another; here that generator is seeded from `generator` for the call and put back afterwards.

    Args:
        tensor: Weight, shape (fan_out, fan_in, *kernel); trailing dimensions are flattened into the columns.
        sparsity: Share of each column set to zero, in [0, 1).
        std: Standard deviation of the other weights, in (0, inf).
        generator: Source of randomness; None is torch's global one.

    Raises:
        TypeError: if `tensor` is not floating-point.
        ValueError: if it has fewer than 2 dimensions, or a number is out of range.

    Source: Martens 2010, ICML.

    Example:
        >>> weight = sparse(torch.empty(10, 4), sparsity=0.8)
        >>> (weight == 0).sum(dim=0).tolist()
        [8, 8, 8, 8]
    """
    check_tensor("sparse", tensor, generator, min_ndim=2)
    check_in("sparse", "sparsity", sparsity, "[0, 1)")
    check_in("sparse", "std", std, "(0, inf)")
    matrix = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).flatten(1)
    if generator is None:
        nn.init.sparse_(matrix, sparsity, std)
    else:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            nn.init.sparse_(matrix, sparsity, std, generator=generator)
    with torch.no_grad():
        return tensor.copy_(matrix.view(tensor.shape))
