# SPDX-License-Identifier: Apache-2.0
"""What keeps a model from fitting its training set too well, as functions of tensors and parameters."""

from lightning_optkit.regularization.label_smoothing import label_smoothing

__all__ = ["label_smoothing"]
