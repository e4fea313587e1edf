# SPDX-License-Identifier: Apache-2.0
"""Max-norm regularization: the incoming weights of each unit stay within a ball.

Source: Srebro & Shraibman 2005, "Rank, Trace-Norm and Max-Norm"; Hinton et al. 2012, arXiv:1207.0580, page 2;
Srivastava et al. 2014, "Dropout", Section 5.1.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_optkit._checks import check_in, check_int, check_tensors
from lightning_optkit._norms import norm
from lightning_optkit.step.gathering import gathered, scatter_
from lightning_optkit.step.shards import has_whole_rows, local, sharding_groups

__all__ = ["max_norm_"]


@torch.no_grad()
def max_norm_(params: Iterable[Tensor], max_norm: float, dim: int = 0) -> None:
    r"""Scales the weights of every output unit whose norm exceeds `max_norm` down to that norm, in place.

    .. math:: w_j \leftarrow w_j \min\left(1, \frac{c}{\|w_j\|_2}\right)

    Args:
        params: Weights; those with fewer than two dimensions are not changed. Of sharded ones (DTensor) every process
            must pass its part.
        max_norm: c, in (0, inf); 3 to 4 in the literature.
        dim: Dimension of the output units: 0 for Linear, Embedding and Conv, 1 for ConvTranspose.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> weight = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> max_norm_([weight], 1.0)
        >>> weight
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    max_norm = check_in("max_norm_", "max_norm", max_norm, "(0, inf)")
    check_int("max_norm_", "dim", dim, minimum=0)
    for param in check_tensors("max_norm_", "params", params, "inexact"):
        if param.dim() < 2 or not param.numel():
            continue
        if not sharding_groups(param) or (dim == 0 and has_whole_rows(param)):
            _project(local(param), max_norm, dim)
            continue
        (whole,) = gathered([local(param)], [param])
        _project(whole, max_norm, dim)
        scatter_(local(param), whole, param)


def _project(param: Tensor, max_norm: float, dim: int) -> None:
    norms = norm(param, [d for d in range(param.dim()) if d != dim], keepdim=True)
    factor = (max_norm / norms).to(torch.promote_types(param.dtype, torch.float32))
    # torch.renorm shrinks by 1e-7 too much, and so would change the weights at every call.
    param.copy_(torch.where(norms > max_norm, param * factor, param))
