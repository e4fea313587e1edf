# SPDX-License-Identifier: Apache-2.0
"""Clips the L2 norm of each parameter's gradient separately.

Source: the layer-wise form of Pascanu et al. 2013, arXiv:1211.5063, Algorithm 1; the 1e-6 is that of
`torch.nn.utils.clip_grad_norm_`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optkit._checks import check_in
from lightning_optkit._norms import each_norm
from lightning_optkit.clipping._gradients import gradients, norm_of
from lightning_optkit.step import Clip, ClipBounds
from lightning_optkit.step.coefficients import clip_coefficient
from lightning_optkit.step.shards import local

__all__ = ["ClipPerTensor"]


@dataclass(frozen=True)
class ClipPerTensor(Clip):
    """Scales the gradient of each parameter separately, so that its L2 norm is at most `max_norm`.

    One exploding layer does not slow down the others, but the direction of the whole gradient changes. It needs no
    other gradient, so it also works exactly when each parameter is updated as soon as its own gradient is complete. As
    part of a step it costs one read of the gradients and no write; a step with a non-finite gradient is skipped,
    including its counters.

    Args:
        max_norm: Largest unclipped norm, in (0, inf).

    Raises:
        ValueError: if `max_norm` is out of range.

    Example:
        >>> small, large = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(2))
        >>> small.grad, large.grad = torch.tensor([0.5]), torch.tensor([3.0, 4.0])
        >>> ClipPerTensor(1.0)([small, large])
        tensor(5.0249)
        >>> small.grad, large.grad
        (tensor([0.5000]), tensor([0.6000, 0.8000]))
    """

    max_norm: float

    def __post_init__(self) -> None:
        check_in(type(self).__name__, "max_norm", self.max_norm, "(0, inf)")

    @property
    def needs_norm(self) -> bool:
        """True: each factor depends on a norm."""
        return True

    @property
    def bounds(self) -> ClipBounds:
        """`max_norm` for each tensor."""
        return ClipBounds(max_tensor_norm=self.max_norm)

    @property
    def constant_bound(self) -> float | None:
        """As `norm_bound`, unless a subclass has another."""
        return math.inf if type(self).norm_bound is ClipPerTensor.norm_bound else None

    def norm_bound(self, norm: Tensor) -> float:
        """inf: the global norm is not bounded."""
        return math.inf

    @torch.no_grad()
    def __call__(self, parameters: Iterable[Tensor]) -> Tensor:
        """Clips the gradients of `parameters` in place, for use with any other optimizer.

        Returns:
            Their global norm before clipping, 0-d.
        """
        grads = gradients(type(self).__name__, parameters)
        norms = each_norm(grads)
        for grad, norm in zip(grads, norms, strict=True):
            local(grad).mul_(clip_coefficient(self.max_norm, norm))
        return norm_of(grads, norms)
