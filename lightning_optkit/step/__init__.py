# SPDX-License-Identifier: Apache-2.0
"""The one-pass step, the base of every optimizer of this package."""

from typing import TYPE_CHECKING

from lightning_optkit._near_names import refusing_names
from lightning_optkit.step.average import Average
from lightning_optkit.step.clip import Clip, ClipBounds, StatefulClip
from lightning_optkit.step.explain import Explanation, GroupPlan
from lightning_optkit.step.in_backward import StepInBackward, step_in_backward
from lightning_optkit.step.optimizer import OnePassOptimizer
from lightning_optkit.step.rule import Rule, Scalar
from lightning_optkit.step.stages import Stages
from lightning_optkit.step.statistics import TensorStatistics

__all__ = [
    "Average",
    "Clip",
    "ClipBounds",
    "Explanation",
    "GroupPlan",
    "OnePassOptimizer",
    "Rule",
    "Scalar",
    "Stages",
    "StatefulClip",
    "StepInBackward",
    "TensorStatistics",
    "step_in_backward",
]

if not TYPE_CHECKING:
    __getattr__ = refusing_names(__name__, __all__)
