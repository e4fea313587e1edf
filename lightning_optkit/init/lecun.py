# SPDX-License-Identifier: Apache-2.0
"""LeCun initialization: maps unit-variance inputs to unit-variance outputs, before any activation.

Source: LeCun et al. 1998, "Efficient BackProp", Section 4.6; Klambauer et al. 2017, arXiv:1706.02515
(SELU).
"""

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_one_of
from lightning_optkit.init._tensor import check_tensor

__all__ = ["lecun"]


def lecun(tensor: Tensor, *, distribution: str = "normal", generator: torch.Generator | None = None) -> Tensor:
    r"""Fills `tensor` in place with :math:`\mathrm{Var}(w) = 1 / fan_{in}`, whatever activation follows; returns it.

    For self-normalizing networks (SELU), linear layers and the scaled tanh 1.7159 tanh(2x/3). Gives the same numbers as
    torch.nn.init.kaiming_normal_ and kaiming_uniform_ with nonlinearity="linear".

    Args:
        tensor: Weight, shape (fan_out, fan_in, *kernel).
        distribution: "normal" or "uniform".
        generator: Random generator; None: torch's global one.

    Raises:
        TypeError: if `tensor` is not floating-point.
        ValueError: if it has fewer than 2 dimensions, or the distribution is unknown.

    Source: LeCun et al. 1998, "Efficient BackProp", Section 4.6.

    Example:
        >>> weight = lecun(torch.empty(300, 100), generator=torch.Generator().manual_seed(0))
        >>> round(float(weight.std()), 2)
        0.1
    """
    check_tensor("lecun", tensor, generator, min_ndim=2)
    check_one_of("lecun", "distribution", distribution, ("normal", "uniform"))
    draw_ = nn.init.kaiming_normal_ if distribution == "normal" else nn.init.kaiming_uniform_
    return draw_(tensor, mode="fan_in", nonlinearity="linear", generator=generator)
