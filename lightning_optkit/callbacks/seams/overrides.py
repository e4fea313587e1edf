# SPDX-License-Identifier: Apache-2.0
"""Puts a function before a method of one module, strategy, precision plugin or loop, and takes it out again.

Several may stand before one method, and be taken out in whatever order.

LightningCLI replaces `configure_optimizers` in the same way, so Lightning knows such overrides.
"""

from collections.abc import Callable
from typing import Any

__all__ = ["override", "restore"]


def override(owner: object, name: str, function: Callable[..., Any]) -> None:
    """Makes `owner.<name>` call `function`, and remembers what the instance itself had there.

    Args:
        owner: The instance; others of its class keep their method.
        name: Of the method. `function` calls what `getattr(owner, name)` returned before.
        function: A function or `functools.partial` for this place alone.
    """
    vars(function)["replaced"] = vars(owner).get(name)
    vars(owner)[name] = function


def restore(owner: object, name: str, function: Callable[..., Any] | None) -> None:
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
