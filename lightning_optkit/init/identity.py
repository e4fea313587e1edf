# SPDX-License-Identifier: Apache-2.0
"""Identity initialization: a layer that initially passes its input through.

Source: Le, Jaitly and Hinton 2015, arXiv:1504.00941 (recurrent matrices); Zagoruyko and Komodakis 2017,
arXiv:1706.00388 (Dirac convolutions).
"""

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_in
from lightning_optkit.init._tensor import check_tensor

__all__ = ["identity"]


def identity(tensor: Tensor, *, scale: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Fills `tensor` in place with `scale` times the identity and returns it.

    A matrix by torch.nn.init.eye_, a convolution kernel by torch.nn.init.dirac_; a rectangular weight passes as many
    inputs as fit. Useful for recurrent matrices with ReLU (`initialize(rnn, he, recurrent=identity)`); in a stack of
    equal layers initialized this way, all layers learn the same.

    Args:
        tensor: Weight, shape (fan_out, fan_in) or (fan_out, fan_in, *kernel) with 1 to 3 kernel dimensions.
        scale: Value on the diagonal, in (-inf, inf).
        generator: Unused, since nothing is drawn; present so that all schemes have the same signature.

    Raises:
        TypeError: if `tensor` is not floating-point.
        ValueError: if it does not have 2 to 5 dimensions.

    Source: Le et al. 2015, arXiv:1504.00941.

    Example:
        >>> identity(torch.empty(2, 3)).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    check_tensor("identity", tensor, generator, min_ndim=2)
    check_in("identity", "scale", scale, "(-inf, inf)")
    if tensor.ndim > 5:
        raise ValueError(f"identity(tensor of shape {tuple(tensor.shape)}): tensor must have 2 to 5 dimensions.")
    (nn.init.eye_ if tensor.ndim == 2 else nn.init.dirac_)(tensor)
    with torch.no_grad():
        return tensor.mul_(scale)
