# SPDX-License-Identifier: Apache-2.0
"""Gradient clipping: folded into the step of an optimizer of this package, or called on gradients for any other."""

from lightning_optkit.clipping.clip_norm import ClipNorm
from lightning_optkit.clipping.clip_value import ClipValue

__all__ = ["ClipNorm", "ClipValue"]
