# SPDX-License-Identifier: Apache-2.0
"""Weighted sharpness-aware minimization: the sharpness as a regularizer with a weight of its own.

Source: Yue et al. 2023, "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term",
arXiv:2305.15817, Equations 6 and 7. The sharpness is part of the gradient, as in the authors' `decouple=False`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optkit._checks import check_in
from lightning_optkit.regularization._pairs import check_pairs

__all__ = ["wsam"]


@torch.no_grad()
def wsam(grads: Sequence[Tensor | None], perturbed: Sequence[Tensor | None], gamma: float = 0.9) -> list[Tensor | None]:
    r"""The gradient of the loss plus weighted sharpness, the rise of the loss to the perturbed weights.

    .. math:: \frac{1 - 2\gamma}{1 - \gamma}\, g + \frac{\gamma}{1 - \gamma}\, g_p

    Args:
        grads: g, gradients of the loss at the weights; None for a parameter without one, which counts as zero.
        perturbed: g_p, gradients at the perturbed weights (see `sam`), in the same order.
        gamma: In [0, 1). 0: no sharpness; 0.5: SAM; above: more sharpness than loss.

    Returns:
        One gradient per parameter; None where both are None.

    Raises:
        ValueError: if an argument is out of range, or the gradients do not fit each other.

    Example:
        >>> wsam([torch.tensor([1.0, 1.0])], [torch.tensor([2.0, 0.0])], gamma=0.75)
        [tensor([ 4., -2.])]
    """
    gamma = check_in("wsam", "gamma", gamma, "[0, 1)")
    grads, perturbed = check_pairs("wsam", grads, "perturbed", perturbed)
    weight = gamma / (1 - gamma)
    return [_combined(g, g_p, weight) for g, g_p in zip(grads, perturbed, strict=True)]


def _combined(grad: Tensor | None, perturbed: Tensor | None, weight: float) -> Tensor | None:
    if grad is None or perturbed is None:
        return grad * (1 - weight) if grad is not None else perturbed * weight if perturbed is not None else None
    return (perturbed * weight).add_(grad, alpha=1 - weight)
