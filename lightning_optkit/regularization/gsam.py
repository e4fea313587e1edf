# SPDX-License-Identifier: Apache-2.0
"""Surrogate gap guided sharpness-aware minimization: SAM that also lowers the loss's rise to the perturbed weights.

Source: Zhuang et al. 2022, "Surrogate Gap Minimization Improves Sharpness-Aware Training", arXiv:2203.08065,
Algorithm 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optkit._checks import check_in
from lightning_optkit._norms import inner_product, total_norm
from lightning_optkit.regularization._pairs import check_pairs

__all__ = ["gsam"]


@torch.no_grad()
def gsam(grads: Sequence[Tensor | None], perturbed: Sequence[Tensor | None], alpha: float = 0.4) -> list[Tensor | None]:
    r"""Sharpness-aware: the perturbed gradient, less a share of what the one at the weights has perpendicular to it.

    .. math:: g_p - \alpha \left(g - \frac{\langle g, g_p \rangle}{\|g_p\|^2} g_p\right)

    with norm and inner product over all parameters together. To first order, the perpendicular part changes the gap
    between both losses and not the perturbed loss.

    Args:
        grads: g, gradients of the loss at the weights; None for a parameter without one, which counts as zero.
        perturbed: g_p, gradients at the perturbed weights (see `sam`), in the same order.
        alpha: Weight of the gap, in [0, inf). 0: SAM.

    Returns:
        One gradient per parameter; None where both are None.

    Raises:
        ValueError: if an argument is out of range, or the gradients do not fit each other.

    Example:
        >>> gsam([torch.tensor([1.0, 1.0])], [torch.tensor([2.0, 0.0])], alpha=0.5)
        [tensor([ 2.0000, -0.5000])]
    """
    alpha = check_in("gsam", "alpha", alpha, "[0, inf)")
    grads, perturbed = check_pairs("gsam", grads, "perturbed", perturbed)
    squares = total_norm([grad for grad in perturbed if grad is not None]).square()
    # Of a zero gradient everything is perpendicular.
    share = torch.where(squares == 0, 0.0, inner_product(grads, perturbed).to(squares.device) / squares)
    return [_combined(g, g_p, alpha, share) for g, g_p in zip(grads, perturbed, strict=True)]


def _combined(grad: Tensor | None, perturbed: Tensor | None, alpha: float, share: Tensor) -> Tensor | None:
    if perturbed is None:
        return None if grad is None else grad * -alpha
    scaled = (perturbed * (1 + alpha * share).to(perturbed.device)).to(perturbed.dtype)
    return scaled if grad is None else scaled.sub_(grad, alpha=alpha)
