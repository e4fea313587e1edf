# SPDX-License-Identifier: Apache-2.0
"""Gradient clips: passed to a one-pass optimizer as `clip=`, or called before the step of any other one."""

from typing import TYPE_CHECKING

from lightning_optkit._near_names import refusing_names
from lightning_optkit.clipping.auto_clip import AutoClip
from lightning_optkit.clipping.clip_norm import ClipNorm
from lightning_optkit.clipping.clip_per_tensor import ClipPerTensor
from lightning_optkit.clipping.clip_unitwise import ClipUnitwise
from lightning_optkit.clipping.clip_value import ClipValue
from lightning_optkit.clipping.z_clip import ZClip

__all__ = ["AutoClip", "ClipNorm", "ClipPerTensor", "ClipUnitwise", "ClipValue", "ZClip"]

if not TYPE_CHECKING:
    __getattr__ = refusing_names(__name__, __all__)
