# SPDX-License-Identifier: Apache-2.0
"""Statistics of one step of one tensor, collected during the walk."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["Clipped", "TensorStatistics"]


class Clipped(NamedTuple):
    """Result of clipping by tensor or by unit: `Clipped` of csrc/core/tables.h.

    Args:
        grad_sq: Sum of squares of the gradients, before scaling.
        num: Number of tensors or units that were scaled down.
    """

    grad_sq: float
    num: float


@dataclass(frozen=True)
class TensorStatistics:
    """Sums over the elements of one parameter in one step.

    Args:
        grad_sq: Sum of squares of the gradient that the rule sees: unscaled, clipped, with L2.
        param_sq: Sum of squares of the new parameter.
        update_sq: Sum of squares of the change of the parameter, before rounding.
        nonfinite: Number of gradient elements that are inf or NaN.
        lost: Number of elements whose stored value did not change although their update was not zero.

    Example:
        >>> import torch
        >>> from lightning_optkit.optimizers import SGD
        >>> weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        >>> optimizer = SGD([weight], lr=1e-3, statistics=True)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> statistics = optimizer.statistics()[0]
        >>> statistics.grad_norm, statistics.lost  # 1 - 0.001 is 1 in bfloat16
        (2.0, 4.0)
    """

    grad_sq: float
    param_sq: float
    update_sq: float
    nonfinite: float
    lost: float

    @property
    def grad_norm(self) -> float:
        """L2 norm of the gradient."""
        return math.sqrt(self.grad_sq)

    @property
    def param_norm(self) -> float:
        """L2 norm of the parameter."""
        return math.sqrt(self.param_sq)

    @property
    def update_norm(self) -> float:
        """L2 norm of the update."""
        return math.sqrt(self.update_sq)

    @staticmethod
    def from_tensors(grad: Tensor, param: Tensor, update: Tensor, lost: Tensor) -> "TensorStatistics":
        """Computes the statistics in plain PyTorch."""
        return TensorStatistics(
            grad_sq=float(grad.double().square().sum()),
            param_sq=float(param.double().square().sum()),
            update_sq=float(update.double().square().sum()),
            nonfinite=float((~grad.isfinite()).sum()),
            lost=float(lost.sum()),
        )
