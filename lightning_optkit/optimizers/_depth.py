# SPDX-License-Identifier: Apache-2.0
"""The depth of a parameter: the layers of a module tree, in order from input to output.

The rule, for any module tree:

1. A stack is a Sequential, ModuleList or ModuleDict with at least two children that are blocks, that is, have
   submodules of their own. Each child of a stack is one layer, whatever it contains.
2. Among nested stacks the outer one counts, unless an inner one has more blocks, or its children are stages: of one
   class, each with other shapes of parameters, as the ever wider ones of Swin and ConvNeXt are, and with stacks inside.
   Then the blocks of the stages are the layers; what a stage has before a block (downsampling) belongs to that block,
   and what it has after them to its last one.
3. Modules registered before, between and after stacks form one layer each time: the stem or the embeddings are the
   first layer; final norm, pooler and head together are the last.
4. A model without blocks (a plain Sequential of Linear layers) has one layer per child of its containers; a model
   without containers has one layer per child.
"""

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from torch import Tensor, nn

from lightning_optkit._checks import shown

__all__ = ["depths"]

_Part: TypeAlias = tuple[bool, Iterable[Tensor]]
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
    parts = list(_merged(_parts(model, *_stacks(model))))
    for depth, params in enumerate(parts):
        for param in params:
            found.setdefault(param, depth)  # a shared parameter belongs to its first use
    return found, len(parts)


def _given_depth(owner: str, name: str, layers: Sequence[str]) -> int:
    for depth, pattern in enumerate(layers):
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*"):
            return depth
    raise ValueError(f"{owner}(layers={shown(list(layers))}): layers must cover every parameter, not all but {name}.")


def _stacks(model: nn.Module) -> tuple[set[nn.Module], set[nn.Module]]:
    """The containers whose children are layers, and those whose children are stages."""
    containers = [module for module in model.modules() if isinstance(module, _CONTAINERS)]
    for count in (_num_blocks, _num_children):
        stacks: set[nn.Module] = {module for module in containers if count(module) >= 2}
        staged = {stack for stack in stacks if _holds_stages(stack, stacks)}
        if stacks:
            outer = stacks - staged
            return {
                s for s in outer if all(count(inner) <= count(s) for inner in s.modules() if inner in stacks)
            }, staged
    return {next((module for module in model.modules() if _num_children(module) >= 2), model)}, set()


def _holds_stages(stack: nn.Module, stacks: set[nn.Module]) -> bool:
    children = _children(stack)
    shapes = {tuple(sorted({tuple(param.shape) for param in child.parameters()})) for child in children}
    has_inner = any(module in stacks for child in children for module in child.modules())
    return has_inner and len({type(child) for child in children}) == 1 and len(shapes) == len(children)


def _children(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if next(child.parameters(), None) is not None]


def _num_children(module: nn.Module) -> int:
    return len(_children(module))


def _num_blocks(module: nn.Module) -> int:
    return sum(bool(_children(child)) for child in _children(module))


def _parts(module: nn.Module, stacks: set[nn.Module], staged: set[nn.Module]) -> Iterator[_Part]:
    """(is a layer of a stack, its parameters), in order of registration."""
    yield False, module.parameters(recurse=False)
    for child in _children(module):
        if module in stacks:
            yield True, child.parameters()
        elif any(inner in stacks for inner in child.modules()):
            parts = _parts(child, stacks, staged)
            yield from _joined(parts) if module in staged else parts
        elif module in staged:  # a stage of one block
            yield True, child.parameters()
        else:
            yield False, child.parameters()


def _joined(parts: Iterable[_Part]) -> Iterator[_Part]:
    """The layers of a stage, each with what comes before it; the last one also with what comes after it."""
    layers: list[list[Tensor]] = []
    waiting: list[Tensor] = []
    for is_layer, params in parts:
        waiting += params
        if is_layer:
            layers.append(waiting)
            waiting = []
    layers[-1] += waiting
    yield from ((True, layer) for layer in layers)


def _merged(parts: Iterable[_Part]) -> Iterator[list[Tensor]]:
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
