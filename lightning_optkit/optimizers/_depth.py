# SPDX-License-Identifier: Apache-2.0
"""The depth of a parameter: the layers of a module tree, in order from input to output.

The rule, for any module tree:

1. A stack is a Sequential, ModuleList or ModuleDict with at least two children that are blocks, that is, have
   submodules of their own. Each child of a stack is one layer, whatever it contains.
2. Among nested stacks the outer one counts, unless an inner one has more blocks.
3. Modules registered before, between and after stacks form one layer each time: the stem or the embeddings are the
   first layer; final norm, pooler and head together are the last.
4. A model without blocks (a plain Sequential of Linear layers) has one layer per child of its containers; a model
   without containers has one layer per child.
"""

import fnmatch
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from lightning_optkit._checks import shown

__all__ = ["depths"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def depths(
    owner: str, model: nn.Module, names: dict[Tensor, str], layers: Sequence[str] | None
) -> tuple[dict[Tensor, int], int]:
    """The layer of each parameter, from 0 at the input, and the number of layers.

    Args:
        owner: Function or callback named in error messages.
        model: The module tree.
        names: Its parameters by name.
        layers: fnmatch patterns of module or parameter names, in order; None: the rule above.

    Raises:
        ValueError: if a parameter matches none of `layers`.
    """
    if layers is not None:
        return {param: _given_depth(owner, name, layers) for param, name in names.items()}, len(layers)
    found: dict[Tensor, int] = {}
    parts = list(_merged(_parts(model, _stacks(model))))
    for depth, params in enumerate(parts):
        for param in params:
            found.setdefault(param, depth)  # a shared parameter belongs to its first use
    return found, len(parts)


def _given_depth(owner: str, name: str, layers: Sequence[str]) -> int:
    for depth, pattern in enumerate(layers):
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*"):
            return depth
    raise ValueError(f"{owner}(layers={shown(list(layers))}): layers must cover every parameter, not all but {name}.")


def _stacks(model: nn.Module) -> set[nn.Module]:
    containers = [module for module in model.modules() if isinstance(module, _CONTAINERS)]
    for count in (_num_blocks, _num_children):
        stacks = {module for module in containers if count(module) >= 2}
        if stacks:
            return {s for s in stacks if all(count(inner) <= count(s) for inner in s.modules() if inner in stacks)}
    return {next((module for module in model.modules() if _num_children(module) >= 2), model)}


def _children(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if next(child.parameters(), None) is not None]


def _num_children(module: nn.Module) -> int:
    return len(_children(module))


def _num_blocks(module: nn.Module) -> int:
    return sum(bool(_children(child)) for child in _children(module))


def _parts(module: nn.Module, stacks: set[nn.Module]) -> Iterator[tuple[bool, Iterable[Tensor]]]:
    """(is a layer of a stack, its parameters), in order of registration."""
    yield False, module.parameters(recurse=False)
    for child in _children(module):
        if module in stacks:
            yield True, child.parameters()
        elif any(inner in stacks for inner in child.modules()):
            yield from _parts(child, stacks)
        else:
            yield False, child.parameters()


def _merged(parts: Iterable[tuple[bool, Iterable[Tensor]]]) -> Iterator[list[Tensor]]:
    run: list[Tensor] = []
    for is_layer, params in parts:
        if is_layer:
            if run:
                yield run
            yield list(params)
            run = []
        else:
            run += params
    if run:
        yield run
