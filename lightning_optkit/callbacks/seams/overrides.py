# SPDX-License-Identifier: Apache-2.0
"""Puts a function before a method of one module, strategy or precision plugin, and takes it out again.

Callbacks may undo in whatever order.

LightningCLI replaces `configure_optimizers` in the same way, so Lightning knows such overrides.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy

__all__ = ["override", "restore"]

_Owner: TypeAlias = pl.LightningModule | Strategy | Precision


def override(owner: _Owner, name: str, function: Callable[..., Any]) -> None:
    """Makes `owner.<name>` call `function`, and remembers what the instance itself had there."""
    vars(function)["replaced"] = vars(owner).get(name)
    vars(owner)[name] = function


def restore(owner: _Owner, name: str, function: Callable[..., Any] | None) -> None:
    """Takes `function` out of the chain of overrides, wherever in it it stands."""
    above, current = None, vars(owner).get(name)
    while current is not None and current is not function:
        above, current = current, vars(current).get("replaced")
    if current is None:
        return
    replaced = vars(current)["replaced"]
    if above is not None:
        vars(above)["replaced"] = replaced
    elif replaced is not None:
        vars(owner)[name] = replaced
    else:
        del vars(owner)[name]
