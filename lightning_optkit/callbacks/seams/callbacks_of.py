# SPDX-License-Identifier: Apache-2.0
"""The callbacks of a Trainer, by class."""

from collections.abc import Callable
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_optkit.callbacks.seams.lightning_packages import twins

__all__ = ["callbacks_of", "insert_callback"]

T = TypeVar("T")


def callbacks_of(trainer: pl.Trainer, kind: type[T], but: object = None) -> list[T]:
    """The callbacks of class `kind`, in order, without the first occurrence of `but`."""
    untyped: Any = trainer  # Lightning does not declare the attribute
    kinds = twins(kind)  # once: this is asked several times in each batch
    found = [callback for callback in untyped.callbacks if isinstance(callback, kinds)]
    place = next((place for place, callback in enumerate(found) if callback is but), len(found))
    return found[:place] + found[place + 1 :]


def insert_callback(trainer: pl.Trainer, callback: Callback, behind: Callback) -> Callable[[], None]:
    """Inserts `callback` right after another one, and returns a function that removes it."""
    untyped: Any = trainer
    untyped.callbacks.insert(untyped.callbacks.index(behind) + 1, callback)

    def take_out() -> None:
        # A new list: Lightning may be iterating over the old one, and must reach `callback` there.
        untyped.callbacks = callbacks_of(trainer, object, but=callback)

    return take_out
