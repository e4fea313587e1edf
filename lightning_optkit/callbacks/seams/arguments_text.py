# SPDX-License-Identifier: Apache-2.0
"""The arguments of a callback, as text."""

import inspect

from lightning_optkit._checks import shown

__all__ = ["arguments_text", "is_default"]

_LONGEST = 300  # characters


def arguments_text(callback: object) -> str:
    """Those that it keeps, without those at their defaults."""
    made = []
    added = ("log", "log_dict")  # by Lightning, to every callback
    own = {name: value for name, value in vars(callback).items() if name not in added}
    kept = {name.lstrip("_"): value for name, value in own.items()}
    kept |= {name: value for name, value in own.items() if name in kept}
    kept |= own.get("_arguments", {})  # those that it keeps in another form
    for name, parameter in inspect.signature(type(callback).__init__).parameters.items():
        if (
            name in ("self", "verbose")
            or name not in kept
            or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ):
            continue
        value = kept[name]
        if not is_default(value, parameter.default):
            made.append(f"{name}={shown(value)}")
    return ", ".join(made)[:_LONGEST]


def is_default(value: object, default: object) -> bool:
    """Whether they are equal."""
    try:
        return bool(value == default)
    except Exception:  # tensors and arrays have no single answer
        return False
