# SPDX-License-Identifier: Apache-2.0
"""WHEN: one thin Lightning callback per strategy."""

from lightning_optkit.callbacks.activation_regularization import ActivationRegularization
from lightning_optkit.callbacks.early_stopping_criterion import EarlyStoppingCriterion
from lightning_optkit.callbacks.elastic_net import ElasticNet
from lightning_optkit.callbacks.fuse import Fuse
from lightning_optkit.callbacks.gradient_noise import GradientNoise
from lightning_optkit.callbacks.label_smoothing import LabelSmoothing
from lightning_optkit.callbacks.max_norm import MaxNorm
from lightning_optkit.callbacks.r_drop import RDrop
from lightning_optkit.callbacks.report import Report
from lightning_optkit.callbacks.sam import SAM
from lightning_optkit.callbacks.stochastic_depth import StochasticDepth
from lightning_optkit.callbacks.weight_averaging import WeightAveraging

__all__ = [
    "SAM",
    "ActivationRegularization",
    "EarlyStoppingCriterion",
    "ElasticNet",
    "Fuse",
    "GradientNoise",
    "LabelSmoothing",
    "MaxNorm",
    "RDrop",
    "Report",
    "StochasticDepth",
    "WeightAveraging",
]
