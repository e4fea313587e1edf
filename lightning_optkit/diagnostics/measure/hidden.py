# SPDX-License-Identifier: Apache-2.0
"""Parameters of modules that are kept in a plain list, tuple or dict, where torch does not find them."""

from collections.abc import Iterator, Mapping, Set
from typing import Any

from torch import Tensor, nn

__all__ = ["hidden_parameters"]

_OF_TORCH = frozenset(vars(nn.Module()))  # its own tables of parts and hooks


def hidden_parameters(modules: Mapping[str, nn.Module], own: Set[Tensor]) -> dict[str, Tensor]:
    """Those that require a gradient, of modules in training mode, by where they are: a teacher in eval mode is meant.

    Args:
        modules: Modules by name, with those below them, as of `named_modules()`.
        own: Their parameters.

    Example:
        >>> root = nn.Module()
        >>> root.blocks = [nn.Linear(2, 2)]
        >>> list(hidden_parameters({"": root}, set()))
        ['blocks[0].weight', 'blocks[0].bias']
    """
    found: dict[str, Tensor] = {}
    for owner, module in modules.items():
        for attribute, value in vars(module).items():
            if attribute in _OF_TORCH or not isinstance(value, (list, tuple, dict)):
                continue
            for place, part in _parts(value):
                if part.training:
                    name = f"{owner}.{attribute}{place}".lstrip(".")
                    inside = ((f"{name}.{each}", p) for each, p in part.named_parameters())
                    found.update((each, p) for each, p in inside if p.requires_grad and p not in own)
    return found


def _parts(value: Any) -> Iterator[tuple[str, nn.Module]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return ((f"[{key!r}]", part) for key, part in pairs if isinstance(part, nn.Module))
