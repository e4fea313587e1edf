# SPDX-License-Identifier: Apache-2.0
"""One thin Lightning callback per strategy: it decides when the strategy is applied."""

from typing import TYPE_CHECKING

from lightning_optkit._near_names import refusing_names
from lightning_optkit.callbacks.activation_regularization import ActivationRegularization
from lightning_optkit.callbacks.augment import Augment
from lightning_optkit.callbacks.batch_regime import BatchRegime
from lightning_optkit.callbacks.batch_size_schedule import BatchSizeSchedule
from lightning_optkit.callbacks.compress_checkpoint import CompressCheckpoint
from lightning_optkit.callbacks.dropout_schedule import DropoutSchedule
from lightning_optkit.callbacks.early_stopping_criterion import EarlyStoppingCriterion
from lightning_optkit.callbacks.elastic_net import ElasticNet
from lightning_optkit.callbacks.exact_accumulation import ExactAccumulation
from lightning_optkit.callbacks.exact_resume import ExactResume
from lightning_optkit.callbacks.fuse import Fuse
from lightning_optkit.callbacks.gradient_clipping import GradientClipping
from lightning_optkit.callbacks.gradient_health import GradientHealth
from lightning_optkit.callbacks.gradient_noise import GradientNoise
from lightning_optkit.callbacks.grokfast import Grokfast
from lightning_optkit.callbacks.gsam import GSAM
from lightning_optkit.callbacks.hyperparameter_schedule import HyperparameterSchedule
from lightning_optkit.callbacks.initialize import Initialize
from lightning_optkit.callbacks.label_smoothing import LabelSmoothing
from lightning_optkit.callbacks.look_sam import LookSAM
from lightning_optkit.callbacks.lookahead import Lookahead
from lightning_optkit.callbacks.lr_finder import LRFinder
from lightning_optkit.callbacks.lr_schedule import LRSchedule
from lightning_optkit.callbacks.max_norm import MaxNorm
from lightning_optkit.callbacks.noise_scale import NoiseScale
from lightning_optkit.callbacks.parameter_groups import ParameterGroups
from lightning_optkit.callbacks.plateau_schedule import PlateauSchedule
from lightning_optkit.callbacks.power_snapshots import PowerSnapshots
from lightning_optkit.callbacks.preprocess import Preprocess
from lightning_optkit.callbacks.prune_trial import PruneTrial
from lightning_optkit.callbacks.qk_clip import QKClip
from lightning_optkit.callbacks.r_drop import RDrop
from lightning_optkit.callbacks.release_gradients import ReleaseGradients
from lightning_optkit.callbacks.report import Report
from lightning_optkit.callbacks.safe_checkpoint_io import SafeCheckpointIO
from lightning_optkit.callbacks.sam import SAM
from lightning_optkit.callbacks.schedule_free import ScheduleFree
from lightning_optkit.callbacks.schedule_free_wrapper import ScheduleFreeWrapper
from lightning_optkit.callbacks.snapshot_ensemble import SnapshotEnsemble
from lightning_optkit.callbacks.spike_guard import SpikeGuard
from lightning_optkit.callbacks.stochastic_depth import StochasticDepth
from lightning_optkit.callbacks.weight_averaging import WeightAveraging
from lightning_optkit.callbacks.wsam import WSAM

__all__ = [
    "GSAM",
    "SAM",
    "WSAM",
    "ActivationRegularization",
    "Augment",
    "BatchRegime",
    "BatchSizeSchedule",
    "CompressCheckpoint",
    "DropoutSchedule",
    "EarlyStoppingCriterion",
    "ElasticNet",
    "ExactAccumulation",
    "ExactResume",
    "Fuse",
    "GradientClipping",
    "GradientHealth",
    "GradientNoise",
    "Grokfast",
    "HyperparameterSchedule",
    "Initialize",
    "LRFinder",
    "LRSchedule",
    "LabelSmoothing",
    "LookSAM",
    "Lookahead",
    "MaxNorm",
    "NoiseScale",
    "ParameterGroups",
    "PlateauSchedule",
    "PowerSnapshots",
    "Preprocess",
    "PruneTrial",
    "QKClip",
    "RDrop",
    "ReleaseGradients",
    "Report",
    "SafeCheckpointIO",
    "ScheduleFree",
    "ScheduleFreeWrapper",
    "SnapshotEnsemble",
    "SpikeGuard",
    "StochasticDepth",
    "WeightAveraging",
]

if not TYPE_CHECKING:
    __getattr__ = refusing_names(__name__, __all__)
