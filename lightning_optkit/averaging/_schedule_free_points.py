# SPDX-License-Identifier: Apache-2.0
"""The three points of Schedule-Free around the step of any optimizer, of which two are kept: y and z, or z and x.

Source: Defazio et al. 2024, arXiv:2405.15682, Equations 2-4: z takes the steps, x is the average of z, and gradients
are taken at y = beta x + (1 - beta) z. Decay at y and the weights as in `ScheduleFreeWrapper` of the authors' package
schedulefree 1.4.1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GroupWeights", "average_at", "begin_step_", "end_step_"]


@dataclass
class GroupWeights:
    """The weights of a group's average so far.

    Args:
        steps: Number of steps.
        weight_sum: The sum of their weights.
        lr_max: The largest rate so far.
    """

    steps: int = 0
    weight_sum: float = 0.0
    lr_max: float = 0.0

    def next_share(self, lr: float, r: float, weight_lr_power: float) -> float:
        """Counts a step at rate `lr`, and returns the share of its z in x."""
        self.lr_max = max(self.lr_max, lr)
        self.steps += 1
        weight = self.steps**r * self.lr_max**weight_lr_power
        self.weight_sum += weight
        return weight / self.weight_sum if self.weight_sum else 0.0  # no rate so far, so that z has not moved


def average_at(y: Tensor, z: Tensor, beta: float) -> Tensor:
    """The point x, given the other two."""
    return y.lerp(z, 1 - 1 / beta)


@torch.no_grad()
def begin_step_(param: Tensor, other: Tensor, beta: float, decay: float) -> None:
    """Exchanges y and z for z and x, before the optimizer steps `param`.

    Args:
        param: Holds y; afterwards z.
        other: Holds z; afterwards x.
        beta: Weight of x in y.
        decay: Share of y that z loses, which leaves x where it is.
    """
    z = other.clone()
    other.copy_(average_at(param, z, beta))
    param.copy_(z.sub_(param, alpha=decay) if decay else z)


@torch.no_grad()
def end_step_(param: Tensor, other: Tensor, beta: float, share: float) -> None:
    """Exchanges z and x for y and z, after the optimizer has stepped `param`.

    Args:
        param: Holds z; afterwards y.
        other: Holds x; afterwards z.
        beta: Weight of x in y.
        share: How far x moves toward z.
    """
    x, z = other.clone().lerp_(param, share), param.clone()
    param.copy_(x.lerp_(z, 1 - beta))
    other.copy_(z)
