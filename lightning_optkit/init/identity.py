# SPDX-License-Identifier: Apache-2.0
"""Identity initialization: a layer that starts by handing its input on.

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

    A matrix by torch.nn.init.eye_, a convolution kernel by torch.nn.init.dirac_; a rectangular weight keeps as many
    inputs as fit. Good for recurrent matrices with ReLU (`initialize(rnn, he, recurrent=identity)`); a stack of equal
    layers started so learns nothing that its first layer does not.

    Args:
        tensor: Weight, shape (fan_out, fan_in) or (fan_out, fan_in, *kernel) with 1 to 3 kernel dimensions.
        scale: The ones become this, in (-inf, inf).
        generator: Not used: nothing is drawn. Present so that every scheme can be called alike.

    Raises:
        TypeError: if `tensor` is not floating-point.
        ValueError: if it has not 2 to 5 dimensions.

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
