# SPDX-License-Identifier: Apache-2.0
"""WHEN: one thin Lightning callback per strategy."""

from lightning_optkit.callbacks.fuse import Fuse
from lightning_optkit.callbacks.report import Report
from lightning_optkit.callbacks.schedule_free import ScheduleFree
from lightning_optkit.callbacks.weight_averaging import WeightAveraging

__all__ = ["Fuse", "Report", "ScheduleFree", "WeightAveraging"]
