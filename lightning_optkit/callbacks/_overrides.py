# SPDX-License-Identifier: Apache-2.0
"""Puts a function before a method of one module or strategy, and takes it out again, in whatever order callbacks undo.

LightningCLI replaces `configure_optimizers` in the same way, so Lightning knows such overrides.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import Strategy

__all__ = ["override", "restore"]


def override(pl_module: pl.LightningModule | Strategy, name: str, function: Callable[..., Any]) -> None:
    """Makes `pl_module.<name>` call `function`, and remembers what the instance itself had there."""
    vars(function)["replaced"] = vars(pl_module).get(name)
    vars(pl_module)[name] = function


def restore(pl_module: pl.LightningModule | Strategy, name: str, function: Callable[..., Any] | None) -> None:
    """Takes `function` out of the chain of overrides, wherever in it it stands."""
    above, current = None, vars(pl_module).get(name)
    while current is not None and current is not function:
        above, current = current, vars(current).get("replaced")
    if current is None:
        return
    replaced = vars(current)["replaced"]
    if above is not None:
        vars(above)["replaced"] = replaced
    elif replaced is not None:
        vars(pl_module)[name] = replaced
    else:
        del vars(pl_module)[name]
