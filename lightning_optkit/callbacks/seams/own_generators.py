# SPDX-License-Identifier: Apache-2.0
"""Random generators that data sets, samplers, transforms and modules have of their own, as `self.rng`."""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from types import MethodType, ModuleType, NoneType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from lightning_optkit._torch_private import kept_iterator
from lightning_optkit.callbacks.seams.internal_names import internal_names

__all__ = ["KINDS", "OwnGenerator", "generators_of", "set_state_of", "state_of"]

OwnGenerator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random

KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_LEAVES = (NoneType, Tensor, np.ndarray, str, bytes, int, float, type, ModuleType, pl.Trainer, pl.LightningModule)
_DEPTH, _ENTRIES, _OBJECTS = 6, 32, 1000  # of nested objects; of a list; looked at in each of two searches


def generators_of(loaders: Sequence[object], pl_module: nn.Module, but: Sequence[object]) -> dict[str, OwnGenerator]:
    """Each once, by where it is: below the loaders, and below the attributes of the module and its layers.

    Long lists, closures, and what a C extension keeps are not searched.

    Args:
        loaders: Those of the training.
        pl_module: The module.
        but: Generators that are known already.
    """
    seen = {id(each) for each in (*but, torch.default_generator, *map(kept_iterator, loaders))}  # made in each epoch
    found: dict[str, OwnGenerator] = {}
    below: list[tuple[str, object, int]] = [(f"loader {place}", each, 0) for place, each in enumerate(loaders)]
    nested: list[tuple[str, object, int]] = []
    for name, module in pl_module.named_modules():
        owner = f"module.{name}" if name else "module"
        for at, each in vars(module).items():
            if isinstance(each, KINDS):
                below.append((f"{owner}.{at}", each, 0))
            elif callable(getattr(type(module), at, None)):
                continue  # a method that a callback has replaced: what it draws from is the callback's
            elif at not in internal_names() and not isinstance(each, _LEAVES):
                nested.append((f"{owner}.{at}", each, 0))
    seen.update(map(id, pl_module.modules()))
    for waiting in (below, nested):  # apart: objects of a large module are not counted among those of the loaders
        _search(waiting, seen, found)
    return found


def _search(waiting: list[tuple[str, object, int]], seen: set[int], found: dict[str, OwnGenerator]) -> None:
    """Adds to `found`, by path, what is at or below those that wait; each is a path, an object and its depth."""
    most = len(seen) + _OBJECTS
    for path, each, depth in waiting:  # which grows
        if id(each) in seen or isinstance(each, _LEAVES) or len(seen) > most:
            continue
        if isinstance(each, tuple) and all(isinstance(part, _LEAVES) for part in each):
            continue  # as the stride of a convolution
        seen.add(id(each))
        if isinstance(each, KINDS):
            found[path] = each
        elif depth < _DEPTH:
            waiting += [(f"{path}{name}", part, depth + 1) for name, part in _parts(each)]


def state_of(generator: OwnGenerator) -> Any:
    """Its state, in tensors and plain types."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        version, words, gauss = generator.getstate()
        return version, torch.tensor(words), gauss  # a tensor is much faster than 625 numbers, before each batch
    if isinstance(generator, np.random.Generator):
        return _plain(generator.bit_generator.state)
    return _plain(generator.get_state(legacy=False))


def set_state_of(generator: OwnGenerator, state: Any) -> None:
    """Restores the result of `state_of`.

    Raises:
        TypeError, ValueError: if it is that of another kind of generator.
    """
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        version, words, gauss = state
        generator.setstate((version, tuple(words.tolist()), gauss))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = _arrays(state)
    else:
        generator.set_state(_arrays(state))


def _parts(owner: object) -> Iterator[tuple[str, object]]:
    if isinstance(owner, partial):
        yield from ((".func", owner.func), (".args", owner.args), (".keywords", owner.keywords))
    elif isinstance(owner, MethodType):
        yield ".__self__", owner.__self__
    elif isinstance(owner, (list, tuple, dict)):
        entries = owner.items() if isinstance(owner, dict) else enumerate(owner)
        yield from ((f"[{key!r}]", each) for key, each in entries if len(owner) <= _ENTRIES)
    else:
        # Of loaders that it sees made, Lightning keeps the arguments a second time.
        own = getattr(owner, "__dict__", {})
        yield from ((f".{name}", own[name]) for name in sorted(own, key=lambda name: name.startswith("_")))


def _plain(state: Any) -> Any:
    if isinstance(state, np.ndarray):
        return {"array": state.tolist(), "dtype": str(state.dtype)}
    if isinstance(state, dict):
        return {key: _plain(each) for key, each in state.items()}
    return state.item() if isinstance(state, np.generic) else state


def _arrays(state: Any) -> Any:
    if isinstance(state, dict):
        if state.keys() == {"array", "dtype"}:
            return np.array(state["array"], dtype=state["dtype"])
        return {key: _arrays(each) for key, each in state.items()}
    return state
