# SPDX-License-Identifier: Apache-2.0
"""Modules selected by a shell pattern, level by level: `*` does not match a dot."""

from fnmatch import fnmatchcase

from torch import Tensor, nn

from lightning_optkit._checks import shown

__all__ = ["first_tensor", "modules_named", "with_first"]


def modules_named(owner: str, argument: str, module: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """All modules whose name matches, by name, in the order of the module tree.

    Raises:
        ValueError: if there is none.
    """
    levels = pattern.split(".")
    found = {
        name: child
        for name, child in module.named_modules()
        if len(parts := name.split(".")) == len(levels) and all(map(fnmatchcase, parts, levels)) and name
    }
    if not found:
        names = [name for name, _ in module.named_modules()][1:]
        more = ", ..." if len(names) > 8 else ""
        known = f"there are {', '.join(names[:8])}{more}" if names else f"{type(module).__name__} has no submodules"
        raise ValueError(f"{owner}({argument}={shown(pattern)}): no module has such a name; {known}.")
    return found


def first_tensor(owner: str, name: str, output: object) -> Tensor:
    """The main output of a layer: its output, or the first of several (recurrent layers, attention).

    Raises:
        TypeError: if that is not a tensor.
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise TypeError(f"{owner}(...): {name} returns {type(first).__name__}; it must return a tensor, or one first.")
    return first


def with_first(output: object, first: Tensor) -> object:
    """The same output with the first tensor replaced."""
    return (first, *output[1:]) if isinstance(output, tuple | list) else first
