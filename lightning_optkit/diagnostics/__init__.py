# SPDX-License-Identifier: Apache-2.0
"""Records and reports of runs and their environment: pure functions, without Lightning."""

from typing import TYPE_CHECKING

from lightning_optkit._near_names import refusing_names
from lightning_optkit.diagnostics.environment import environment
from lightning_optkit.diagnostics.lr_range import LRRange, lr_range
from lightning_optkit.diagnostics.noise_scale import GradientNoiseScale, gradient_noise_scale
from lightning_optkit.diagnostics.report import Curve, RunRecord, result_rows, write_report
from lightning_optkit.diagnostics.spike_detector import SpikeDetector, SpikeEvent
from lightning_optkit.diagnostics.verdict import Verdict

__all__ = [
    "Curve",
    "GradientNoiseScale",
    "LRRange",
    "RunRecord",
    "SpikeDetector",
    "SpikeEvent",
    "Verdict",
    "environment",
    "gradient_noise_scale",
    "lr_range",
    "result_rows",
    "write_report",
]

if not TYPE_CHECKING:
    __getattr__ = refusing_names(__name__, __all__)
