# SPDX-License-Identifier: Apache-2.0
"""WHEN: one thin Lightning callback per strategy."""

from lightning_optkit.callbacks.augment import Augment
from lightning_optkit.callbacks.fuse import Fuse
from lightning_optkit.callbacks.initialize import Initialize
from lightning_optkit.callbacks.label_smoothing import LabelSmoothing
from lightning_optkit.callbacks.preprocess import Preprocess
from lightning_optkit.callbacks.report import Report
from lightning_optkit.callbacks.weight_averaging import WeightAveraging

__all__ = ["Augment", "Fuse", "Initialize", "LabelSmoothing", "Preprocess", "Report", "WeightAveraging"]
