# SPDX-License-Identifier: Apache-2.0
"""The factors that every path computes alike: the clip coefficient, and the weight of a new value in an average."""

from typing import TypeVar

import torch
from torch import Tensor

from lightning_optkit.step.average import AverageKind

__all__ = ["average_weight", "clip_coefficient", "exact_bound"]

_Number = TypeVar("_Number", float, Tensor)


def clip_coefficient(bound: float | Tensor, norm: _Number) -> _Number:
    """The factor that scales gradients of norm `norm` down to `bound`; as in csrc/core/pipeline.h.

    The 1e-6 is the one in `torch.nn.utils.clip_grad_norm_`.
    """
    coefficient = bound / (norm + 1e-6)
    return coefficient.clamp(max=1.0) if isinstance(coefficient, Tensor) else min(1.0, coefficient)  # type: ignore[return-value]


def exact_bound(bound: float | Tensor, norm: _Number) -> _Number:
    """The bound for which `clip_coefficient` is bound / norm, without the 1e-6.

    A bound that was learned from norms scales with them, so that there a constant would clip small gradients that are
    not above it. Does not synchronize.
    """
    if isinstance(norm, Tensor):
        return torch.where(norm > 0, bound / norm * (norm + 1e-6), bound)
    return bound / norm * (norm + 1e-6) if norm > 0 else bound  # type: ignore[return-value]


def average_weight(kind: AverageKind | int, decay: float, num_averaged: _Number) -> float | _Number:
    """Weight of a new value in an average that was updated `num_averaged` times; as in csrc/core/pipeline.h.

    A count in a tensor is not read here, so it must not be 0.
    """
    if not isinstance(num_averaged, Tensor) and num_averaged == 0:
        return 1.0
    return 1.0 - decay if kind == AverageKind.EXPONENTIAL else 1.0 / (num_averaged + 1.0)
