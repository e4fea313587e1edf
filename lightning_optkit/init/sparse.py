# SPDX-License-Identifier: Apache-2.0
"""Sparse initialization: most weights are zero, the rest large.

Source: Martens 2010, "Deep learning via Hessian-free optimization", ICML.
As in torch, a fraction of each column is zero (outgoing connections of a unit); Martens fixes the number of incoming
connections.
"""

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_in
from lightning_optkit.init._tensor import check_tensor

__all__ = ["sparse"]


def sparse(
    tensor: Tensor, *, sparsity: float = 0.9, std: float = 0.01, generator: torch.Generator | None = None
) -> Tensor:
    """Fills `tensor` in place from N(0, std^2), sets a fraction of each column to zero, and returns it.

    Gives the same numbers as torch.nn.init.sparse_, which draws the positions of the zeros from the global
    generator even if given another one; here the global generator is seeded from `generator` for the call and restored
    afterwards.

    Args:
        tensor: Weight, shape (fan_out, fan_in, *kernel); trailing dimensions are flattened into the columns.
        sparsity: Fraction of each column to set to zero, in [0, 1).
        std: Standard deviation of the other weights, in (0, inf).
        generator: Random generator; None: torch's global one.

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
