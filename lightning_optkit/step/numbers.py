# SPDX-License-Identifier: Apache-2.0
"""The numbers of a parameter group, read once per step for the compiled path and the reference path alike."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_optkit.step.average import Average, KeptInState
from lightning_optkit.step.clip import NO_BOUNDS, Clip
from lightning_optkit.step.rule import Group, decay_per_rate

__all__ = [
    "ROUNDINGS",
    "GroupNumbers",
    "compute_dtype",
    "decay_of",
    "is_due",
    "read_group",
    "starts_at_a_step",
    "unclipped",
]

ROUNDINGS = ("nearest", "stochastic", "kahan", "split24", "split32")  # in the order of Rounding in csrc/core/tables.h


class GroupNumbers(NamedTuple):
    """The fields of GroupRow in csrc/core/tables.h, in the same order (a test compares the two).

    A tuple, since one is built per group and step: a frozen dataclass with as many fields takes five times as long
    (1.65 us against 0.34 by `timeit`).
    """

    lr: float
    weight_decay: float
    decoupled: float
    cautious: float
    maximize: float
    l1: float
    centralize: float
    clip_value: float
    clip_tensor_norm: float
    clip_unit_ratio: float
    clip_unit_eps: float
    rounding: float
    rounding_seed: float
    average_kind: float
    average_decay: float
    average_due: float


_BOUNDS = ("clip_value", "clip_tensor_norm", "clip_unit_ratio")


def read_group(
    group: Group,
    clip: Clip | None,
    average: Average | None,
    *,
    average_is_due: bool,
    num_averaged: int = 0,
    owns_decay: bool = False,
    device: torch.device | None = None,
) -> GroupNumbers:
    """Reads a group, which schedulers may have changed since the last step.

    The decay of a rule with its own decay is not a stage, and is 0 here. A learning rate on `device` is NaN here: the
    step reads it on the device. `num_averaged` counts the updates of the average so far.
    """
    bounds = clip.bounds if clip is not None else NO_BOUNDS
    # By position, which takes half the time.
    return GroupNumbers(
        math.nan if isinstance(group["lr"], Tensor) and group["lr"].device == device else float(group["lr"]),
        0.0 if owns_decay else decay_per_rate(group),
        float(group["decoupled_weight_decay"]),
        float(group["cautious"]),
        float(group["maximize"]),
        float(group["l1"]),
        float(group["centralize"]),
        bounds.max_value,
        bounds.max_tensor_norm,
        bounds.unit_ratio,
        bounds.unit_eps,
        float(ROUNDINGS.index(group["rounding"])),
        float(group["rounding_seed"]),
        float(average.kind) if average else 0.0,
        decay_of(average, float(group["average_decay"]), num_averaged) if average else 0.0,
        float(average_is_due),
    )


def unclipped(numbers: Sequence[GroupNumbers]) -> list[GroupNumbers]:
    """The same numbers with no bound on a gradient, for parameters that the clip leaves out."""
    no_bounds = dict.fromkeys(_BOUNDS, math.inf)
    return [each._replace(**no_bounds) for each in numbers]


def is_due(average: Average | None, clock: int) -> bool:
    """Whether optimizer step `clock`, from 1, updates the average."""
    return average is not None and clock >= average.start and (clock - average.start) % average.every == 0


def starts_at_a_step(average: KeptInState) -> bool:
    """Whether it starts at an optimizer step: a run alone knows the step of an epoch or of a fraction."""
    return not isinstance(average.start, float) and getattr(average, "start_interval", "step") == "step"


def decay_of(average: Average, decay: float, num_averaged: int) -> float:
    """`Average.decay_at`, also for a class of a user that has the other names alone: `decay`."""
    decay_at = getattr(average, "decay_at", None)
    return decay if decay_at is None else float(decay_at(decay, num_averaged))


def compute_dtype(param: Tensor) -> torch.dtype:
    """fp64 parameters are updated in fp64, all others in fp32."""
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32
