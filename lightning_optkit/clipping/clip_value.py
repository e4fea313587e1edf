# SPDX-License-Identifier: Apache-2.0
"""Clips each gradient element separately.

Source: Mikolov 2012, "Statistical language models based on neural networks", section 3.3.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optkit._checks import check_in
from lightning_optkit.clipping._gradients import gradients
from lightning_optkit.step import Clip, ClipBounds

__all__ = ["ClipValue"]


@dataclass(frozen=True)
class ClipValue(Clip):
    """Clamps every gradient element to [-max_value, max_value]. The direction of the gradient changes.

    As part of a step it causes no memory traffic.

    Args:
        max_value: Largest unclipped magnitude, in (0, inf).

    Raises:
        ValueError: if `max_value` is out of range.

    Example:
        >>> ClipValue(0.5)
        ClipValue(max_value=0.5)
    """

    max_value: float

    def __post_init__(self) -> None:
        check_in(type(self).__name__, "max_value", self.max_value, "(0, inf)")

    @property
    def needs_norm(self) -> bool:
        """False: elements are clipped separately."""
        return False

    @property
    def bounds(self) -> ClipBounds:
        """`max_value` for each element."""
        return ClipBounds(max_value=self.max_value)

    def norm_bound(self, norm: Tensor) -> float:
        """inf: the norm is not bounded."""
        return math.inf

    @torch.no_grad()
    def __call__(self, parameters: Iterable[Tensor]) -> None:
        """Clips the gradients of `parameters` in place, for use with any other optimizer."""
        for grad in gradients(type(self).__name__, parameters):
            real = torch.view_as_real(grad) if grad.is_complex() else grad  # as in torch.optim
            real.clamp_(-self.max_value, self.max_value)
