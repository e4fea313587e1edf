# SPDX-License-Identifier: Apache-2.0
"""Clips the global L2 norm of the gradients.

Source: Pascanu et al. 2013, arXiv:1211.5063, Algorithm 1; the 1e-6 is that of `torch.nn.utils.clip_grad_norm_`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optkit._checks import check_in

__all__ = ["ClipNorm"]


@dataclass(frozen=True)
class ClipNorm:
    """Scales all gradients by one factor, so that their global L2 norm is at most `max_norm`.

    Folded into a step it costs one read of the gradients and no write, and a step with a non-finite gradient is
    skipped, counters included.

    Args:
        max_norm: Largest norm left as it is, in (0, inf).

    Raises:
        ValueError: if `max_norm` is out of range.

    Example:
        >>> round(ClipNorm(1.0).coefficient(norm=4.0), 6)
        0.25
    """

    max_norm: float

    def __post_init__(self) -> None:
        check_in("ClipNorm", "max_norm", self.max_norm, "(0, inf)")

    @property
    def needs_norm(self) -> bool:
        """True: the factor depends on the global norm."""
        return True

    @property
    def max_value(self) -> float:
        """inf: no element is bounded by itself."""
        return math.inf

    def coefficient(self, norm: float) -> float:
        """The factor, in (0, 1], for gradients of the given global norm."""
        return min(1.0, self.max_norm / (norm + 1e-6))

    def __call__(self, parameters: Iterable[Tensor]) -> Tensor:
        """Clips the gradients of `parameters` in place, for use with any other optimizer.

        Returns:
            Their norm before clipping, 0-d.
        """
        return torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
