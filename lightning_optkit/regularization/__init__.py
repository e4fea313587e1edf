# SPDX-License-Identifier: Apache-2.0
"""Regularization, as functions of tensors and parameters."""

from typing import TYPE_CHECKING

from lightning_optkit._near_names import refusing_names
from lightning_optkit.regularization.activation_regularization import (
    activation_regularization,
    temporal_activation_regularization,
)
from lightning_optkit.regularization.asam import asam
from lightning_optkit.regularization.early_stopping import (
    generalization_loss,
    progress,
    progress_quotient,
    successive_increases,
)
from lightning_optkit.regularization.elastic_net import elastic_net
from lightning_optkit.regularization.gradient_noise import gradient_noise_, gradient_noise_std
from lightning_optkit.regularization.grokfast import grokfast_
from lightning_optkit.regularization.gsam import gsam
from lightning_optkit.regularization.l1_penalty import l1_penalty
from lightning_optkit.regularization.l2_penalty import l2_penalty
from lightning_optkit.regularization.label_smoothing import label_smoothing
from lightning_optkit.regularization.look_sam import look_sam, look_sam_direction
from lightning_optkit.regularization.max_norm import max_norm_
from lightning_optkit.regularization.qk_clip import max_logits, qk_clip_
from lightning_optkit.regularization.r_drop import r_drop
from lightning_optkit.regularization.sam import sam
from lightning_optkit.regularization.soft_threshold import soft_threshold_
from lightning_optkit.regularization.sparsity import sparsity
from lightning_optkit.regularization.stochastic_depth import linear_drop_rates, stochastic_depth
from lightning_optkit.regularization.weights_of import weights_of
from lightning_optkit.regularization.wsam import wsam

__all__ = [
    "activation_regularization",
    "asam",
    "elastic_net",
    "generalization_loss",
    "gradient_noise_",
    "gradient_noise_std",
    "grokfast_",
    "gsam",
    "l1_penalty",
    "l2_penalty",
    "label_smoothing",
    "linear_drop_rates",
    "look_sam",
    "look_sam_direction",
    "max_logits",
    "max_norm_",
    "progress",
    "progress_quotient",
    "qk_clip_",
    "r_drop",
    "sam",
    "soft_threshold_",
    "sparsity",
    "stochastic_depth",
    "successive_increases",
    "temporal_activation_regularization",
    "weights_of",
    "wsam",
]

if not TYPE_CHECKING:
    __getattr__ = refusing_names(__name__, __all__)
