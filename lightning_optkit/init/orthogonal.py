# SPDX-License-Identifier: Apache-2.0
"""Orthogonal initialization: a (semi-)orthogonal matrix, which preserves the norm of a signal.

Source: Saxe, McClelland and Ganguli 2013, arXiv:1312.6120.
"""

import torch
from torch import Tensor, nn

from lightning_optkit.init._tensor import check_tensor
from lightning_optkit.init.gain import Activation, gain_for

__all__ = ["orthogonal"]


def orthogonal(
    tensor: Tensor, *, activation: Activation = "linear", generator: torch.Generator | None = None
) -> Tensor:
    """Fills `tensor` in place with g times a random (semi-)orthogonal matrix and returns it.

    Trailing dimensions are flattened into the columns. Gives the same numbers as torch.nn.init.orthogonal_; fp16
    and bf16 tensors, which torch cannot factorize, are drawn in fp32 and rounded.

    Args:
        tensor: Weight, shape (fan_out, fan_in, *kernel).
        activation: The activation that follows; its `gain` is g.
        generator: Random generator; None: torch's global one.

    Raises:
        TypeError: if `tensor` is not floating-point.
        ValueError: if it has fewer than 2 dimensions, or the activation is unknown.

    Source: Saxe et al. 2013, arXiv:1312.6120.

    Example:
        >>> weight = orthogonal(torch.empty(3, 8))
        >>> torch.allclose(weight @ weight.T, torch.eye(3), atol=1e-6)
        True
    """
    check_tensor("orthogonal", tensor, generator, min_ndim=2)
    scale = gain_for("orthogonal", activation)
    if tensor.dtype in (torch.float32, torch.float64):
        return nn.init.orthogonal_(tensor, gain=scale, generator=generator)
    drawn = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
    with torch.no_grad():
        return tensor.copy_(nn.init.orthogonal_(drawn, gain=scale, generator=generator))
