# SPDX-License-Identifier: Apache-2.0
"""Xavier (Glorot) initialization: a variance that balances the forward and the backward pass.

Source: Glorot and Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks", AISTATS.
"""

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_one_of
from lightning_optkit.init._tensor import check_tensor
from lightning_optkit.init.gain import Activation, gain_for

__all__ = ["xavier"]


def xavier(
    tensor: Tensor,
    *,
    activation: Activation = "linear",
    distribution: str = "uniform",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Fills `tensor` in place with :math:`\mathrm{Var}(w) = 2 g^2 / (fan_{in} + fan_{out})` and returns it.

    For tanh, sigmoid and linear layers. Gives the same numbers as torch.nn.init.xavier_uniform_ and
    xavier_normal_.

    Args:
        tensor: Weight, shape (fan_out, fan_in, *kernel).
        activation: The activation that follows; its `gain` is g.
        distribution: "uniform" or "normal".
        generator: Random generator; None: torch's global one.

    Raises:
        TypeError: if `tensor` is not floating-point.
        ValueError: if it has fewer than 2 dimensions, or an argument is unknown.

    Source: Glorot and Bengio 2010, AISTATS.

    Example:
        >>> weight = xavier(torch.empty(300, 100), generator=torch.Generator().manual_seed(0))
        >>> round(float(weight.std()), 3), round((2 / 400) ** 0.5, 3)
        (0.071, 0.071)
    """
    check_tensor("xavier", tensor, generator, min_ndim=2)
    check_one_of("xavier", "distribution", distribution, ("uniform", "normal"))
    draw_ = nn.init.xavier_uniform_ if distribution == "uniform" else nn.init.xavier_normal_
    return draw_(tensor, gain=gain_for("xavier", activation), generator=generator)
