# SPDX-License-Identifier: Apache-2.0
"""Truncated normal initialization: small Gaussian weights without tails, as in BERT and ViT.

Source: Devlin et al. 2018, arXiv:1810.04805 (standard deviation 0.02 in the released code).
"""

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_in
from lightning_optkit.init._tensor import check_tensor

__all__ = ["truncated_normal"]


def truncated_normal(
    tensor: Tensor, *, std: float = 0.02, bound: float = 2.0, generator: torch.Generator | None = None
) -> Tensor:
    """Fills `tensor` in place from N(0, std^2) cut off at +-bound * std and returns it.

    Gives the same numbers as torch.nn.init.trunc_normal_. Truncation reduces the spread: at bound=2 the standard
    deviation is 0.88 * std. It is the same for every layer, whatever its depth and width.

    Args:
        tensor: Any shape.
        std: Standard deviation before truncation, in (0, inf).
        bound: Truncation point, in units of `std`, in (0, inf).
        generator: Random generator; None: torch's global one.

    Raises:
        TypeError: if `tensor` is not floating-point.
        ValueError: if it is empty, or a number is out of range.

    Source: Devlin et al. 2018, arXiv:1810.04805.

    Example:
        >>> weight = truncated_normal(torch.empty(64, 64))
        >>> bool(weight.abs().max() <= 0.04)
        True
    """
    check_tensor("truncated_normal", tensor, generator, min_ndim=0)
    check_in("truncated_normal", "std", std, "(0, inf)")
    check_in("truncated_normal", "bound", bound, "(0, inf)")
    return nn.init.trunc_normal_(tensor, std=std, a=-bound * std, b=bound * std, generator=generator)
