# SPDX-License-Identifier: Apache-2.0
"""LookSAM: SAM whose second gradient is taken in every k-th step and reused in the others.

Source: Liu et al. 2022, "Towards Efficient and Scalable Sharpness-Aware Minimization", arXiv:2203.02714, Algorithm 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optkit._checks import check_in
from lightning_optkit._norms import inner_product, total_norm
from lightning_optkit.regularization._pairs import check_pairs

__all__ = ["look_sam", "look_sam_direction"]


@torch.no_grad()
def look_sam_direction(grads: Sequence[Tensor | None], perturbed: Sequence[Tensor | None]) -> list[Tensor | None]:
    r"""Of a sharpness-aware gradient, what is perpendicular to the one at the weights; it changes slowly.

    .. math:: g_v = g_p - \frac{\langle g_p, g \rangle}{\|g\|^2} g

    with norm and inner product over all parameters together.

    Args:
        grads: g, gradients of the loss at the weights; None for a parameter without one, which counts as zero.
        perturbed: g_p, gradients at the perturbed weights (see `sam`), in the same order.

    Returns:
        One tensor per parameter; None where both are None.

    Raises:
        ValueError: if the gradients do not fit each other.

    Example:
        >>> look_sam_direction([torch.tensor([2.0, 0.0])], [torch.tensor([1.0, 1.0])])
        [tensor([0., 1.])]
    """
    grads, perturbed = check_pairs("look_sam_direction", grads, "perturbed", perturbed)
    squares = total_norm([grad for grad in grads if grad is not None]).square()
    share = torch.where(squares == 0, 0.0, inner_product(perturbed, grads).to(squares.device) / squares)
    return [g_p if g is None else _plus(g_p, g, -share) for g, g_p in zip(grads, perturbed, strict=True)]


@torch.no_grad()
def look_sam(
    grads: Sequence[Tensor | None], direction: Sequence[Tensor | None], alpha: float = 0.7
) -> list[Tensor | None]:
    r"""The gradient plus the sharpness-aware direction of an earlier step, at a length relative to the gradient.

    .. math:: g + \alpha \frac{\|g\|}{\|g_v\|} g_v

    Args:
        grads: g, gradients of the loss at the weights; None for a parameter without one, which counts as zero.
        direction: g_v, by `look_sam_direction`, in the same order.
        alpha: Length of the direction relative to the gradient, in [0, inf).

    Returns:
        One gradient per parameter; None where both are None.

    Raises:
        ValueError: if an argument is out of range, or the tensors do not fit each other.

    Example:
        >>> look_sam([torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 2.0])], alpha=0.5)
        [tensor([3.0000, 6.5000])]
    """
    alpha = check_in("look_sam", "alpha", alpha, "[0, inf)")
    grads, direction = check_pairs("look_sam", grads, "direction", direction)
    lengths = [total_norm([t for t in tensors if t is not None]) for tensors in (grads, direction)]
    length, reused = lengths[0], lengths[1].to(lengths[0].device)
    share = torch.where(reused == 0, 0.0, alpha * length / reused)
    return [g if g_v is None else _plus(g, g_v, share) for g, g_v in zip(grads, direction, strict=True)]


def _plus(tensor: Tensor | None, added: Tensor, share: Tensor) -> Tensor:
    """`tensor + share * added`; None counts as zero."""
    scaled = (added * share.to(added.device)).to(added.dtype)
    return scaled if tensor is None else tensor + scaled
