# SPDX-License-Identifier: Apache-2.0
"""An override that a copy of its owner does not have: for what watches a step, in which users copy and save modules."""

from collections.abc import Callable
from functools import update_wrapper
from typing import Any

__all__ = ["WatchedMethod"]


class WatchedMethod:
    """For `override(owner, name, ...)`; copies and pickles of `owner` have what it replaces.

    Args:
        owner: The instance.
        name: Name of the method.
        function: Called in place of the method, with that and the arguments of the call.
    """

    def __init__(self, owner: object, name: str, function: Callable[..., Any]) -> None:
        original: Any = getattr(owner, name)
        update_wrapper(self, original)
        # Lightning looks through one wrapper, for the signature and the code of the function behind it.
        self.__wrapped__: Any = original.__wrapped__ if isinstance(original, WatchedMethod) else original
        self._owner, self._name, self._original, self._function = owner, name, original, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._original, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        replaced = vars(self).get("replaced")
        # The copy of the owner has no attributes yet, so that this is the method of its class.
        return (getattr, (self._owner, self._name)) if replaced is None else (_itself, (replaced,))


def _itself(method: Any) -> Any:
    return method
