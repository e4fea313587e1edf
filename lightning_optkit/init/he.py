# SPDX-License-Identifier: Apache-2.0
"""He (Kaiming) initialization: keeps the variance constant across layers with rectifiers.

Source: He et al. 2015, "Delving Deep into Rectifiers", arXiv:1502.01852.
"""

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_one_of
from lightning_optkit.init._tensor import check_tensor
from lightning_optkit.init.gain import Activation, gain_for, torch_nonlinearity

__all__ = ["he"]


def he(
    tensor: Tensor,
    *,
    activation: Activation = "relu",
    mode: str = "fan_in",
    distribution: str = "normal",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Fills `tensor` in place with :math:`\mathrm{Var}(w) = g^2 / fan` and returns it.

    For ReLU and similar activations. Gives the same numbers as torch.nn.init.kaiming_normal_ and
    kaiming_uniform_; for an activation without a gain in torch (GELU, SiLU, ...), torch's linear draw is multiplied by
    its `gain`.

    Args:
        tensor: Weight, shape (fan_out, fan_in, *kernel).
        activation: The activation that follows; its `gain` is g.
        mode: "fan_in" preserves the variance of the forward pass, "fan_out" that of the backward pass.
        distribution: "normal" or "uniform".
        generator: Random generator; None: torch's global one.

    Raises:
        TypeError: if `tensor` is not floating-point.
        ValueError: if it has fewer than 2 dimensions, or an argument is unknown.

    Source: He et al. 2015, arXiv:1502.01852.

    Example:
        >>> weight = he(torch.empty(300, 200), generator=torch.Generator().manual_seed(0))
        >>> round(float(weight.std()), 2), round((2 / 200) ** 0.5, 2)
        (0.1, 0.1)
    """
    check_tensor("he", tensor, generator, min_ndim=2)
    check_one_of("he", "mode", mode, ("fan_in", "fan_out"))
    check_one_of("he", "distribution", distribution, ("normal", "uniform"))
    draw_ = nn.init.kaiming_normal_ if distribution == "normal" else nn.init.kaiming_uniform_
    known = torch_nonlinearity(activation, "he")
    name, slope = known if known is not None else ("linear", None)
    scale = 1.0 if known is not None else gain_for("he", activation)
    # The default slopes of torch's layer functions and of calculate_gain differ (0 against 0.01); F.leaky_relu has
    # 0.01.
    slope = 0.01 if slope is None else slope
    draw_(tensor, a=slope, mode=mode, nonlinearity=name, generator=generator)  # type: ignore[arg-type]
    with torch.no_grad():
        return tensor.mul_(scale)
