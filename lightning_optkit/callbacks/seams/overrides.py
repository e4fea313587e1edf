# SPDX-License-Identifier: Apache-2.0
"""Overrides a method of one module, strategy, precision plugin or loop instance, and removes the override.

A method may have several overrides, which may be removed in any order.

LightningCLI replaces `configure_optimizers` in the same way, so Lightning supports such overrides.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

__all__ = ["override", "override_once", "restore"]


def override(owner: object, name: str, function: Callable[..., Any]) -> None:
    """Makes `owner.<name>` call `function`, and remembers the instance's previous attribute.

    Args:
        owner: The instance; others of its class are not affected.
        name: Name of the method. `function` must call the previous value of `getattr(owner, name)`.
        function: A function or `functools.partial` that is used only here.
    """
    vars(function)["replaced"] = vars(owner).get(name)
    vars(owner)[name] = function


def override_once(owner: object, name: str, function: Callable[..., Any]) -> None:
    """Makes `owner.<name>` call `function(owner, previous, ...)`, unless it does already, perhaps below another one."""
    current = getattr(owner, name)
    while isinstance(current, partial):
        if current.func is function:
            return
        current = vars(current).get("replaced")
    override(owner, name, partial(function, owner, getattr(owner, name)))


def restore(owner: object, name: str, function: Callable[..., Any] | None) -> None:
    """Removes `function` from the chain of overrides, at any position."""
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
