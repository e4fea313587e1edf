# SPDX-License-Identifier: Apache-2.0
"""Normalization layers that read each row once: torch's arguments and state dicts, on CPU and CUDA."""

from lightning_optkit.layers.add_layer_norm import AddLayerNorm, add_layer_norm
from lightning_optkit.layers.add_rms_norm import AddRMSNorm, add_rms_norm
from lightning_optkit.layers.drop_path import DropPath
from lightning_optkit.layers.layer_norm import LayerNorm, layer_norm
from lightning_optkit.layers.rms_norm import RMSNorm, rms_norm

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "DropPath",
    "LayerNorm",
    "RMSNorm",
    "add_layer_norm",
    "add_rms_norm",
    "layer_norm",
    "rms_norm",
]
