# SPDX-License-Identifier: Apache-2.0
"""Clips the global L2 norm of the gradients.

Source: Pascanu et al. 2013, arXiv:1211.5063, Algorithm 1; the 1e-6 is that of `torch.nn.utils.clip_grad_norm_`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from lightning_optkit._checks import check_in
from lightning_optkit.clipping._gradients import scale_to_bound_
from lightning_optkit.step import Clip, ClipBounds
from lightning_optkit.step.clip import NO_BOUNDS

__all__ = ["ClipNorm"]


@dataclass(frozen=True)
class ClipNorm(Clip):
    """Scales all gradients by one factor, so that their global L2 norm is at most `max_norm`.

    The factor is min(1, max_norm / (norm + 1e-6)), as in torch: a `max_norm` near 1e-6 shrinks gradients more than it
    says, also smaller ones.

    As part of a step it costs one read of the gradients and no write; a step with a non-finite gradient is skipped,
    including its counters.

    Args:
        max_norm: Largest unclipped norm, in (0, inf).

    Raises:
        ValueError: if `max_norm` is out of range.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> ClipNorm(1.0)([weight])
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """

    max_norm: float

    def __post_init__(self) -> None:
        check_in(type(self).__name__, "max_norm", self.max_norm, "(0, inf)")

    @property
    def needs_norm(self) -> bool:
        """True: the factor depends on the global norm."""
        return True

    @property
    def bounds(self) -> ClipBounds:
        """None besides the global norm."""
        return NO_BOUNDS

    @property
    def constant_bound(self) -> float | None:
        """As `norm_bound`, unless a subclass has another."""
        return self.max_norm if type(self).norm_bound is ClipNorm.norm_bound else None

    def norm_bound(self, norm: Tensor) -> float:
        """`max_norm`, whatever the norm."""
        return self.max_norm

    def __call__(self, parameters: Iterable[Tensor]) -> Tensor:
        """Clips the gradients of `parameters` in place, for use with any other optimizer.

        Returns:
            Their norm before clipping, 0-d.
        """
        return scale_to_bound_(type(self).__name__, parameters, self.norm_bound)
