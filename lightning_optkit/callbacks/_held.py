# SPDX-License-Identifier: Apache-2.0
"""Hyper-parameters that lie in no parameter group: who holds them, how to write them, and how to undo it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_optkit._torch_private import AnyDropout
from lightning_optkit.callbacks.elastic_net import ElasticNet
from lightning_optkit.callbacks.gradient_clipping import GradientClipping
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.clipping import ClipNorm, ClipPerTensor, ClipValue
from lightning_optkit.layers import AddLayerNorm, AddRMSNorm, DropBlock2d, DropConnect, DropPath, LockedDropout
from lightning_optkit.step import OnePassOptimizer

__all__ = ["HELD", "Held"]

_WITH_P = (AnyDropout, DropBlock2d, DropConnect, DropPath, LockedDropout)
_WITH_DROPOUT = (nn.MultiheadAttention, nn.RNNBase, AddLayerNorm, AddRMSNorm)


@dataclass(frozen=True)
class Held:
    """One value outside the groups.

    Args:
        value: What it was when the training started.
        write: Sets it.
        undo: Sets it back.
    """

    value: float
    write: Callable[[float], None]
    undo: Callable[[], None]


def _attribute(holder: Any, name: str) -> Held:
    value = getattr(holder, name)
    return Held(float(value), partial(setattr, holder, name), partial(setattr, holder, name, value))


def _dropouts(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Held]:
    for module in pl_module.modules():
        if isinstance(module, _WITH_P):
            yield _attribute(module, "p")
        elif isinstance(module, _WITH_DROPOUT) and module.dropout > 0:  # 0: the layer is meant to have none
            yield _attribute(module, "dropout")


def _clip_values(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Held]:
    if trainer.gradient_clip_val:
        yield _attribute(trainer, "gradient_clip_val")
    clippings = callbacks_of(trainer, GradientClipping)
    for clipping in clippings:
        for place, clip in clipping.clips.items():
            if bound := _bound_of(clip):
                yield _of_clip(clip, bound, partial(clipping.replace_clip, place))
    for place, optimizer in enumerate(trainer.optimizers if not clippings else ()):
        if isinstance(optimizer, OnePassOptimizer) and (bound := _bound_of(optimizer.clip)):
            yield _of_clip(optimizer.clip, bound, partial(_set_clip, trainer, place))


def _l1(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Held]:
    """Where the proximal step has a pass of its own; a folded one is an entry of the groups."""
    for callback in callbacks_of(trainer, ElasticNet):
        if callback._own["l1"]:
            yield _attribute(callback, "l1")


HELD: dict[str, Callable[[pl.Trainer, pl.LightningModule], Iterator[Held]]] = {
    "dropout": _dropouts,
    "gradient_clip_val": _clip_values,
    "l1": _l1,
}


def _bound_of(clip: Any) -> str | None:
    """The field of a clip that bounds what the Trainer's `gradient_clip_val` does."""
    if isinstance(clip, ClipNorm | ClipPerTensor):
        return "max_norm"
    return "max_value" if isinstance(clip, ClipValue) else None


def _of_clip(clip: Any, bound: str, put: Callable[[Any], None]) -> Held:
    """A clip is never changed, but replaced."""
    return Held(getattr(clip, bound), lambda value: put(replace(clip, **{bound: value})), partial(put, clip))


def _set_clip(trainer: pl.Trainer, place: int, clip: Any) -> None:
    optimizer = trainer.optimizers[place] if place < len(trainer.optimizers) else None
    if isinstance(optimizer, OnePassOptimizer) and optimizer.clip is not None:  # Fuse may have taken it out already
        optimizer.clip = clip
