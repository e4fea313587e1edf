# SPDX-License-Identifier: Apache-2.0
"""WHEN: one thin Lightning callback per strategy."""

from lightning_optkit.callbacks.batch_regime import BatchRegime
from lightning_optkit.callbacks.batch_size_schedule import BatchSizeSchedule
from lightning_optkit.callbacks.exact_accumulation import ExactAccumulation
from lightning_optkit.callbacks.exact_resume import ExactResume
from lightning_optkit.callbacks.fuse import Fuse
from lightning_optkit.callbacks.hyperparameter_schedule import HyperparameterSchedule
from lightning_optkit.callbacks.lr_schedule import LRSchedule
from lightning_optkit.callbacks.parameter_groups import ParameterGroups
from lightning_optkit.callbacks.plateau_schedule import PlateauSchedule
from lightning_optkit.callbacks.report import Report
from lightning_optkit.callbacks.weight_averaging import WeightAveraging

__all__ = [
    "BatchRegime",
    "BatchSizeSchedule",
    "ExactAccumulation",
    "ExactResume",
    "Fuse",
    "HyperparameterSchedule",
    "LRSchedule",
    "ParameterGroups",
    "PlateauSchedule",
    "Report",
    "WeightAveraging",
]
