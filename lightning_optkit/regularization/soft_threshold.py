# SPDX-License-Identifier: Apache-2.0
"""The proximal step of the L1 penalty, which makes weights exactly zero.

Source: Parikh & Boyd 2014, "Proximal Algorithms", Section 6.5.2 (soft thresholding).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_optkit._checks import check_in, check_tensors

__all__ = ["soft_threshold_"]


@torch.no_grad()
def soft_threshold_(params: Iterable[Tensor], threshold: float) -> None:
    r"""Moves every element toward zero by `threshold`, in place; elements that would cross zero become zero.

    .. math:: w \leftarrow \operatorname{sign}(w) \max(|w| - \theta, 0)

    After a gradient step of rate :math:`\eta` and with :math:`\theta = \eta \lambda` it is proximal gradient descent
    on the loss plus :math:`\lambda \sum |w|`. 16-bit parameters are computed in fp32 and rounded once.

    Args:
        params: Real floating-point parameters; a complex one counts as pairs of real numbers, as in torch.optim.
        threshold: Theta, in [0, inf).

    Raises:
        ValueError: if `threshold` is out of range.

    Example:
        >>> weight = torch.tensor([1.0, -0.25, 0.0, -2.0])
        >>> soft_threshold_([weight], 0.5)
        >>> weight
        tensor([ 0.5000, -0.0000,  0.0000, -1.5000])
    """
    threshold = check_in("soft_threshold_", "threshold", threshold, "[0, inf)")
    for param in check_tensors("soft_threshold_", "params", params, "inexact"):
        stored = torch.view_as_real(param) if torch.is_complex(param) else param
        work = stored.to(torch.promote_types(stored.dtype, torch.float32))
        stored.copy_(torch.sign(work) * (work.abs() - threshold).clamp(min=0))
