# SPDX-License-Identifier: Apache-2.0
"""The parameters of a module and their gradients as they are now; of many, only those that are written are copied.

A step of the module may write parameters itself: those of a teacher that follows the others, or of an embedding with
`max_norm`. A frozen network of billions of weights beside it need not be copied for that.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_optkit._torch_private import BeforeWrites, foreach_copy_
from lightning_optkit.callbacks.seams.lightning_private import is_compiled

__all__ = ["KeptParameters"]

_FEW = 2**22  # elements; of fewer a copy takes less than to look at each operation, which takes some 30 us


class KeptParameters:
    """What `restore` puts back: weights, gradients, `requires_grad`, and the tensor that a parameter stands for.

    Up to 4 million weights and gradients are copied at once, more right before they are written within `watched`. More
    of a compiled module are not, since torch.compile would run it uncompiled there, nor are those of subclasses, as of
    sharded parameters.

    Args:
        pl_module: The module.
    """

    def __init__(self, pl_module: pl.LightningModule) -> None:
        params = [param for param in pl_module.parameters() if _is_plain(param)]
        self._places = [(param, param.data, param.grad, param.requires_grad) for param in params]
        self._by_storage: dict[int, list[Tensor]] = {}
        self._copies: dict[int, list[Tensor]] = {}  # of those of a storage
        for _, data, grad, _ in self._places:
            for t in (data, None if grad is None else grad.data):
                place = None if t is None else _storage_of(t)
                if t is not None and place is not None:
                    self._by_storage.setdefault(place, []).append(t)
        is_small = sum(t.numel() for held in self._by_storage.values() for t in held) <= _FEW
        self._is_watched = not is_small and not is_compiled(pl_module)
        for place in self._by_storage if is_small else ():
            self._copy(place)

    def watched(self) -> AbstractContextManager[Any]:
        """A context manager around what may write them."""
        return BeforeWrites(self._before_write) if self._is_watched else nullcontext()

    def restore(self) -> None:
        """Puts them back; a pending backward pass does not notice."""
        if self._copies:
            written = [t for place in self._copies for t in self._by_storage[place]]
            foreach_copy_(written, [value for copies in self._copies.values() for value in copies])
        for param, data, grad, requires_grad in self._places:
            if param.data_ptr() != data.data_ptr() or param.shape != data.shape or param.stride() != data.stride():
                param.data = data
            if param.grad is not grad:
                param.grad = grad
            param.requires_grad_(requires_grad)

    def _before_write(self, t: Tensor) -> None:
        place = _storage_of(t)
        if place in self._by_storage and place not in self._copies:
            self._copy(place)

    def _copy(self, place: int) -> None:
        self._copies[place] = [t.clone() for t in self._by_storage[place]]


def _storage_of(t: Tensor) -> int | None:
    """Where its numbers are; None if it has none of its own."""
    return t.untyped_storage().data_ptr() if _is_plain(t) and t.numel() else None


def _is_plain(t: Tensor) -> bool:
    """Whether it is dense, in memory, and of no subclass, as lazy and sharded parameters are."""
    return type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and not t.is_meta
