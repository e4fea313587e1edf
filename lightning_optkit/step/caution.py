# SPDX-License-Identifier: Apache-2.0
"""The cautious mask: an update without the elements that go up their gradient.

Source: Liang et al. 2024, arXiv:2411.16085, Algorithm 1, with the scale of the authors' code: the mean of the mask, at
least 1e-3.
"""

from torch import Tensor

__all__ = ["cautious_update"]

_LEAST_SHARE = 1e-3


def cautious_update(update: Tensor, grad: Tensor) -> Tensor:
    """`update` where it has the sign of `grad`, else 0, divided by the share of such elements.

    Args:
        update: What is subtracted from the parameter, without decoupled decay.
        grad: The gradient that the rule sees, of the same shape.
    """
    agrees = (update.sign() * grad.sign() > 0).to(update.dtype)  # a product of small numbers might be 0
    return update * (agrees / agrees.mean().clamp(min=_LEAST_SHARE))
