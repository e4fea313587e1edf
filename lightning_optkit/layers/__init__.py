# SPDX-License-Identifier: Apache-2.0
"""Layers: normalizations that read each row once, compatible with torch's, and layers that torch lacks."""

from typing import TYPE_CHECKING

from lightning_optkit._near_names import refusing_names
from lightning_optkit.layers.add_layer_norm import AddLayerNorm, add_layer_norm
from lightning_optkit.layers.add_rms_norm import AddRMSNorm, add_rms_norm
from lightning_optkit.layers.drop_block2d import DropBlock2d
from lightning_optkit.layers.drop_connect import DropConnect
from lightning_optkit.layers.drop_path import DropPath
from lightning_optkit.layers.ghost_batch_norm1d import GhostBatchNorm1d
from lightning_optkit.layers.ghost_batch_norm2d import GhostBatchNorm2d
from lightning_optkit.layers.layer_norm import LayerNorm, layer_norm
from lightning_optkit.layers.layer_norm2d import LayerNorm2d
from lightning_optkit.layers.locked_dropout import LockedDropout
from lightning_optkit.layers.rms_norm import RMSNorm, rms_norm
from lightning_optkit.layers.rms_norm2d import RMSNorm2d
from lightning_optkit.layers.scale_norm import ScaleNorm
from lightning_optkit.layers.swap_norms import NormSwap, NormSwaps, swap_norms
from lightning_optkit.layers.weight_standardized_conv2d import WeightStandardizedConv2d

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "DropBlock2d",
    "DropConnect",
    "DropPath",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "LayerNorm",
    "LayerNorm2d",
    "LockedDropout",
    "NormSwap",
    "NormSwaps",
    "RMSNorm",
    "RMSNorm2d",
    "ScaleNorm",
    "WeightStandardizedConv2d",
    "add_layer_norm",
    "add_rms_norm",
    "layer_norm",
    "rms_norm",
    "swap_norms",
]

if not TYPE_CHECKING:
    __getattr__ = refusing_names(__name__, __all__)
