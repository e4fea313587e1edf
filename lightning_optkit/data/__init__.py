# SPDX-License-Identifier: Apache-2.0
"""Data before the model: transforms that are fitted on the training set, fixed, or drawn anew for every batch.

Fitted transforms learn with `fit(batches)`, or `partial_fit(batch)` ... `finalize()`, and store the result in buffers:
it is saved in the state dict and moves with `.to(device)`. `merge` combines two of them.
"""

from typing import TYPE_CHECKING

from lightning_optkit._near_names import refusing_names
from lightning_optkit.data.cut_mix import CutMix
from lightning_optkit.data.fit_in_order import fit_in_order
from lightning_optkit.data.gaussian_noise import GaussianNoise
from lightning_optkit.data.impute import Impute
from lightning_optkit.data.merge_across_ranks import merge_across_ranks
from lightning_optkit.data.min_max_scale import MinMaxScale
from lightning_optkit.data.mixup import Mixup
from lightning_optkit.data.mixup_or_cut_mix import MixupOrCutMix
from lightning_optkit.data.one_hot import OneHot
from lightning_optkit.data.random_crop import RandomCrop
from lightning_optkit.data.random_erasing import RandomErasing
from lightning_optkit.data.random_horizontal_flip import RandomHorizontalFlip
from lightning_optkit.data.random_rotation import RandomRotation
from lightning_optkit.data.random_vertical_flip import RandomVerticalFlip
from lightning_optkit.data.resize import resize
from lightning_optkit.data.robust_scale import RobustScale
from lightning_optkit.data.standardize import Standardize
from lightning_optkit.data.vocabulary import Vocabulary
from lightning_optkit.data.whiten import Whiten

__all__ = [
    "CutMix",
    "GaussianNoise",
    "Impute",
    "MinMaxScale",
    "Mixup",
    "MixupOrCutMix",
    "OneHot",
    "RandomCrop",
    "RandomErasing",
    "RandomHorizontalFlip",
    "RandomRotation",
    "RandomVerticalFlip",
    "RobustScale",
    "Standardize",
    "Vocabulary",
    "Whiten",
    "fit_in_order",
    "merge_across_ranks",
    "resize",
]

if not TYPE_CHECKING:
    __getattr__ = refusing_names(__name__, __all__)
