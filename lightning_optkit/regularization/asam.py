# SPDX-License-Identifier: Apache-2.0
"""Adaptive sharpness-aware minimization: SAM with a neighborhood scaled by the weights.

Source: Kwon et al. 2021, "ASAM", arXiv:2102.11600, Section 3 with p = 2 and T_w = |w| + eta. The
authors' code leaves biases unscaled; here every parameter is scaled, as in the paper's definition.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optkit._checks import check_in, check_tensors
from lightning_optkit.regularization.sam import sam
from lightning_optkit.step.shards import local, place_like

__all__ = ["asam"]


@torch.no_grad()
def asam(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], rho: float = 0.5, eta: float = 0.01
) -> list[Tensor | None]:
    r"""The step of a sharpness-aware gradient: to the worst point in an ellipsoid that scales with the weights.

    .. math:: \hat\epsilon = \rho\, \frac{T_w^2 g}{\|T_w g\|_2}, \quad T_w = |w| + \eta

    Rescaling the weights of a layer that is followed by a normalization therefore has no effect (as far as
    :math:`\eta` is small).

    Args:
        params: Weights, sharded (DTensor) or not.
        grads: Gradients of the loss at the weights, in the same order; None for a parameter without one.
        rho: Radius, in (0, inf); about ten times that of SAM.
        eta: Added to the magnitude of a weight, in [0, inf).

    Returns:
        One step per parameter, in its gradient's dtype; None for None.

    Raises:
        ValueError: if an argument is out of range, or the numbers of gradients and parameters differ.

    Cost: twice that of `sam`. Does not synchronize.

    Example:
        >>> asam([torch.tensor([2.0]), torch.tensor([0.0])], [torch.tensor([1.0]), torch.tensor([1.0])], 0.5, eta=0.0)
        [tensor([1.]), tensor([0.])]
    """
    rho, eta = check_in("asam", "rho", rho, "(0, inf)"), check_in("asam", "eta", eta, "[0, inf)")
    params = check_tensors("asam", "params", params, "inexact")
    grads = check_tensors("asam", "grads", grads, "inexact", optional=True)
    if len(params) != len(grads):
        raise ValueError(f"asam(grads=<{len(grads)}>): there must be one for each of the {len(params)} parameters.")
    for param, grad in zip(params, grads, strict=True):
        if grad is not None and grad.shape != param.shape:
            raise ValueError(
                f"asam(grads=<shape {tuple(grad.shape)}>): grads must have the shapes of params, {tuple(param.shape)}."
            )
    stretch = [local(param).abs() + eta for param in params]
    steps = sam([None if grad is None else _times(t, grad) for t, grad in zip(stretch, grads, strict=True)], rho)
    return [
        None if step is None or grad is None else _times(t, step).to(grad.dtype)
        for t, step, grad in zip(stretch, steps, grads, strict=True)
    ]


def _times(stretch: Tensor, grad: Tensor) -> Tensor:
    return place_like(stretch * local(grad), grad)
