# SPDX-License-Identifier: Apache-2.0
"""Which attributes of a module are torch's and Lightning's own."""

from functools import cache

import lightning.pytorch as pl

__all__ = ["internal_names"]


@cache
def internal_names() -> frozenset[str]:
    """Names that every module has: its hooks, tables, trainer.

    Example:
        >>> "_parameters" in internal_names(), "training" in internal_names()
        (True, False)
    """
    return frozenset(vars(pl.LightningModule())) - {"training"}
