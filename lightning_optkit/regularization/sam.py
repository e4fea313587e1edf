# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware minimization: the step that the weights climb before the gradient is taken.

Source: Foret et al. 2021, "Sharpness-Aware Minimization", arXiv:2010.01412, Equation 2 with p = 2, Algorithm 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optkit._checks import check_in, check_tensors
from lightning_optkit._norms import total_norm
from lightning_optkit.step.shards import local, place_like

__all__ = ["sam"]


@torch.no_grad()
def sam(grads: Sequence[Tensor | None], rho: float = 0.05) -> list[Tensor | None]:
    r"""The step of a sharpness-aware gradient: to the worst point, to first order, in a ball around the weights.

    .. math:: \hat\epsilon = \rho\, g / \|g\|_2

    with the norm over all parameters together. Train with the gradient at :math:`w + \hat\epsilon`, taken at
    :math:`w`. A positive factor on all gradients (loss scaling, accumulation) has no effect.

    Args:
        grads: Gradients of the loss at the weights, sharded (DTensor) or not; None for a parameter without one.
        rho: Radius of the ball, in (0, inf).

    Returns:
        One step per gradient, in its dtype; None for None; NaN if a gradient is not finite.

    Raises:
        ValueError: if `rho` is out of range.

    Cost: one read of the gradients, one write of the same size. Does not synchronize.

    Example:
        >>> sam([torch.tensor([3.0]), None, torch.tensor([4.0])], rho=0.5)
        [tensor([0.3000]), None, tensor([0.4000])]
    """
    rho = check_in("sam", "rho", rho, "(0, inf)")
    grads = check_tensors("sam", "grads", grads, "inexact", optional=True)
    present = [grad for grad in grads if grad is not None]
    if not present:
        return [None for _ in grads]
    norm = total_norm(present)
    # A zero gradient has no direction; the step is 0.
    scale = torch.where(norm == 0, 0.0, rho / norm)
    return [None if grad is None else _scaled(grad, scale) for grad in grads]


def _scaled(grad: Tensor, scale: Tensor) -> Tensor:
    here = local(grad)
    return place_like((here * scale.to(here.device)).to(here.dtype), grad)
