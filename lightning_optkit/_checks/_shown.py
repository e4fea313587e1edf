# SPDX-License-Identifier: Apache-2.0
"""The text of a value in an error message: one short line, and never an exception."""

import re
import reprlib
from typing import Any

from torch import Tensor, nn

__all__ = ["kind_shown", "shown"]


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxother, self.maxstring = 3, 120, 200

    def repr1(self, x: Any, level: int) -> str:
        kind = type(x)
        if isinstance(x, type):
            return x.__name__
        if isinstance(x, Tensor):
            return f"<{kind.__name__} of shape {tuple(x.shape)}, {x.dtype}>"
        if isinstance(x, nn.Module) and any(x.children()):
            return f"<{kind.__name__}>"
        if kind.__name__ in ("function", "method", "builtin_function_or_method"):
            return str(getattr(x, "__qualname__", kind.__name__)).rpartition("<locals>.")[2]
        return super().repr1(x, level)

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print integers of more than 4300 digits.
        return repr(x) if x.bit_length() <= 128 else f"<int of {x.bit_length()} bits>"


_SHOWN = _Shown()


def shown(value: object) -> str:
    """The text of `value`: its shortened `repr`; shape and dtype of a tensor, name of a class.

    Example:
        >>> shown([1.5, 10**400, Tensor])
        '[1.5, <int of 1329 bits>, Tensor]'
    """
    try:
        text = _SHOWN.repr(value)
    except Exception:  # any error of a foreign `__repr__`
        text = f"<{type(value).__name__}>"
    return re.sub(r"\s*\n\s*", " ", text)


def kind_shown(value: object) -> str:
    """The text of a value that should be a tensor: its type, except for None and classes."""
    return shown(value) if value is None or isinstance(value, type) else type(value).__name__
