# SPDX-License-Identifier: Apache-2.0
"""What a step changes in a module besides its parameters: buffers, and attributes in Python.

A module may write a running value in place or put a new tensor in its place (`self.center = 0.9 * self.center + ...`),
so both the contents of a buffer and the tensor that stands under its name are kept.
"""

from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from operator import is_
from types import BuiltinFunctionType, FunctionType, ModuleType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_optkit._torch_private import own_buffers, version_of
from lightning_optkit.callbacks.seams.internal_names import internal_names
from lightning_optkit.callbacks.seams.own_generators import KINDS

__all__ = ["Attributes", "Buffers"]

_DEEP, _FEW = 3, 100  # containers in containers, as {"train": []}, are kept; a data set in lists of lists is not
_MANY = 2**22  # elements; more are a data set, of which a copy would take long
_PLAIN = (Tensor, np.ndarray, str, bytes, int, float, complex, list, dict, set, tuple, deque)
_FIXED = (NoneType, type, ModuleType, FunctionType, BuiltinFunctionType, Enum, torch.dtype, torch.device)
_ELSEWHERE = (nn.Module, *KINDS)  # what else puts back


class Buffers:
    """The buffers of a module as they are now; one that is first registered later is let be.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places = [
            (own_buffers(each), key, buffer)
            for each in module.modules()
            for key, buffer in own_buffers(each).items()
            if buffer is None or not is_lazy(buffer)
        ]
        tensors = dict.fromkeys(buffer for _, _, buffer in self._places if buffer is not None)
        self._values = {buffer: buffer.detach().clone() for buffer in tensors}
        self._names = {name: buffer for name, buffer in module.named_buffers() if buffer in self._values}

    def value(self, name: str, now: Tensor) -> Tensor:
        """What the buffer of this name was; `now` for an unknown one."""
        return self._values[self._names[name]] if name in self._names else now

    def restore(self) -> None:
        """Puts tensors and contents back; a pending backward pass may have saved a tensor, so it does not notice."""
        for store, key, buffer in self._places:
            if key in store and store[key] is not buffer:
                store[key] = buffer
        for buffer, value in self._values.items():
            if buffer.shape == value.shape:
                buffer.data.copy_(value)
            else:
                buffer.data = value.clone()


class Attributes:
    """The attributes of a module and all modules in it, and the contents of what they hold.

    That is of lists, dicts, sets, tensors and arrays, and of objects that have nothing but these, plain values,
    functions, modules, generators and such objects. Not of other objects, of which a part would be left, nor of tensors
    and arrays above 4 million elements, which are data. Attributes of torch, Lightning and metrics are let be.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._contents: list[Callable[[], None]] = []
        internal = internal_names()
        for each in module.modules():
            if isinstance(each, Metric) or any(is_lazy(param) for param in each.parameters(recurse=False)):
                continue  # metrics have states; what a lazy layer sets at its first input, it sets once
            own = vars(each)
            values = {name: value for name, value in own.items() if name not in internal}
            self._kept.append((own, values))
            for value in values.values():
                self._contents += _contents(value, _DEEP)

    def restore(self) -> None:
        """Puts them back, and removes those that were not there."""
        internal = internal_names()
        for own, values in self._kept:
            for name in [name for name in own if name not in values and name not in internal]:
                del own[name]
            own.update(values)
        for put_back in self._contents:
            put_back()


def _contents(value: Any, depth: int) -> Iterator[Callable[[], None]]:
    """What puts back the contents of an attribute."""
    if isinstance(value, Tensor):
        if type(value) is Tensor and value.numel() <= _MANY and not value.is_inference():
            yield partial(_rewrite, value, value.detach().clone(), version_of(value))
    elif isinstance(value, np.ndarray):
        if value.size <= _MANY and value.flags.writeable and not value.dtype.hasobject:
            yield partial(np.copyto, value, value.copy())
    elif isinstance(value, list | dict | set | deque):
        yield partial(_refill, value, value.copy())
        if depth > 1 and len(value) <= _FEW:
            for inner in value.values() if isinstance(value, dict) else value:
                yield from _contents(inner, depth - 1)
    elif _is_record(value, depth):
        yield from _contents(vars(value), depth)


def _is_record(value: Any, depth: int) -> bool:
    """Whether it is an object, say of a dataclass, of which all can be put back."""
    own = None if depth < 2 or isinstance(value, (*_FIXED, *_ELSEWHERE)) else getattr(value, "__dict__", None)
    if not isinstance(own, dict) or not 0 < len(own) <= _FEW:
        return False
    kept = (*_PLAIN, *_FIXED, *_ELSEWHERE)
    return all(isinstance(each, kept) or _is_record(each, depth - 1) for each in own.values())


def _rewrite(t: Tensor, content: Tensor, version: int) -> None:
    if version_of(t) == version:
        return
    if t.shape == content.shape:
        t.data.copy_(content)
    else:
        t.data = content


def _refill(held: Any, content: Any) -> None:
    if not _is_same(held, content):
        held.clear()
        (held.extend if isinstance(held, list | deque) else held.update)(content)


def _is_same(held: Any, content: Any) -> bool:
    """Whether it holds the same objects; `==` would compare tensors."""
    if isinstance(held, set):
        return bool(held == content)
    ours, others = ([*each.items()] if isinstance(each, dict) else [*each] for each in (held, content))
    if isinstance(held, dict):
        ours, others = ([part for pair in pairs for part in pair] for pairs in (ours, others))
    return len(ours) == len(others) and all(map(is_, ours, others))
