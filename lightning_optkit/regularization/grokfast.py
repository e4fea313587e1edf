# SPDX-License-Identifier: Apache-2.0
"""Grokfast: the slow part of the gradients, amplified.

Source: Lee et al. 2024, "Grokfast: Accelerated Grokking by Amplifying Slow Gradients", arXiv:2405.20233, Algorithm 2
(Grokfast-EMA). As in the authors' code, the first average is the first gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optkit._checks import check_in, check_tensors
from lightning_optkit.step.shards import local, place_like

__all__ = ["grokfast_"]


@torch.no_grad()
def grokfast_(
    grads: Sequence[Tensor],
    averages: Sequence[Tensor | None],
    alpha: float = 0.98,
    lamb: float = 2.0,
    scale: float = 1.0,
) -> list[Tensor]:
    r"""Adds `lamb` times their average over the steps to the gradients, in place.

    .. math:: \mu \leftarrow \alpha \mu + (1 - \alpha) g, \qquad g \leftarrow g + \lambda \mu

    Args:
        grads: Dense gradients, sharded (DTensor) or not.
        averages: The result of the last step, in the same order; None for a parameter without one.
        alpha: Decay rate of the average, in [0, 1).
        lamb: Weight of the average, in [0, inf).
        scale: What the gradients still have to be divided by, such as a loss scale, in (0, inf); averages are divided.

    Returns:
        The new averages, in fp32 or wider; `averages` are not written to.

    Raises:
        ValueError: if an argument is out of range, or the numbers or shapes of gradients and averages differ.

    Example:
        >>> gradient = torch.tensor([1.0])
        >>> averages = grokfast_([gradient], [None], lamb=2.0)
        >>> gradient, averages
        (tensor([3.]), [tensor([1.])])
    """
    alpha, lamb = check_in("grokfast_", "alpha", alpha, "[0, 1)"), check_in("grokfast_", "lamb", lamb, "[0, inf)")
    if lamb > torch.finfo(torch.float32).max:
        raise ValueError(f"grokfast_(lamb={lamb!r}): lamb must be a number that fp32 can hold.")
    scale = check_in("grokfast_", "scale", scale, "(0, inf)")
    grads = check_tensors("grokfast_", "grads", grads, "inexact")
    averages = check_tensors("grokfast_", "averages", averages, "inexact", optional=True)
    pairs = zip(grads, averages, strict=False)
    if len(grads) != len(averages) or any(m is not None and m.shape != grad.shape for grad, m in pairs):
        raise ValueError(f"grokfast_(averages=<{len(averages)}>): there must be one of the shape of each of grads.")
    updated = []
    for grad, average in zip(grads, averages, strict=True):
        here = local(grad)
        wide = here.to(torch.promote_types(grad.dtype, torch.float32), copy=True).div_(scale)
        new = wide if average is None else torch.lerp(local(average).to(wide.device, wide.dtype), wide, 1 - alpha)
        here.add_(new.to(grad.dtype) if new.dtype != grad.dtype and scale == 1.0 else new * scale, alpha=lamb)
        updated.append(place_like(new, grad))
    return updated
