# SPDX-License-Identifier: Apache-2.0
"""Update rules, one per file, with torch.optim's arguments where torch has the rule."""

from lightning_optkit.optimizers.adam import Adam
from lightning_optkit.optimizers.adamw import AdamW
from lightning_optkit.optimizers.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
