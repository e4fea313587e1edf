# SPDX-License-Identifier: Apache-2.0
"""`lightning.pytorch` and `pytorch_lightning` are the same library under two names, with separate classes.

A module, Trainer, strategy or callback may come from either, so checks against Lightning's classes use this file.
"""

import sys
from typing import Any, TypeGuard, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning_utilities.core.overrides import is_overridden as is_overridden_in

__all__ = ["is_a", "is_overridden", "loss_scaler", "twins"]

T = TypeVar("T")

_OTHER_NAMES = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


def twins(kind: type[T]) -> tuple[type[T], ...]:
    """`kind`, and the same class of the other package, if that is imported.

    Example:
        >>> twins(int)
        (<class 'int'>,)
    """
    for name, other in _OTHER_NAMES.items():
        if kind.__module__ == name or kind.__module__.startswith(f"{name}."):
            module = sys.modules.get(other + kind.__module__.removeprefix(name))
            twin = getattr(module, kind.__name__, None)
            return (kind,) if twin is None else (kind, twin)
    return (kind,)


def is_a(instance: object, *kinds: type[T]) -> TypeGuard[T]:
    """`isinstance`, where a class of `lightning` also matches that of `pytorch_lightning`."""
    return any(isinstance(instance, twins(kind)) for kind in kinds)


def is_overridden(name: str, instance: object) -> bool:
    """Whether a module, data module or callback overrides Lightning's method `name`."""
    for base in (pl.LightningModule, pl.LightningDataModule, pl.Callback):
        for parent in reversed(twins(base)):
            if isinstance(instance, parent):
                return is_overridden_in(name, instance, parent)
    return True  # Lightning calls objects that are no Callbacks by the same names, so any method is their own


def loss_scaler(trainer: pl.Trainer) -> Any:
    """The GradScaler of 16-bit mixed precision, or None."""
    precision: object = trainer.precision_plugin
    return precision.scaler if is_a(precision, MixedPrecision) else None
