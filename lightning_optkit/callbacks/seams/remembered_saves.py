# SPDX-License-Identifier: Apache-2.0
"""ModelCheckpoint remembers over a resume at which step it saved, so that it saves once per step of several batches."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.lightning_private import SAVED_AT, WAITS, WRITES_FILE

__all__ = ["places_of_saves", "put_places_into", "remember_saves"]

_KEY = "optkit_place"  # beside Lightning's own entries, which has none


def remember_saves(trainer: pl.Trainer, override: Callable[..., None]) -> None:
    """Adds to the state of each ModelCheckpoint at which step it saved last, until the fit ends.

    Args:
        trainer: The Trainer; called in `setup`.
        override: Replaces a method for the rest of the fit.
    """
    for saver in callbacks_of(trainer, ModelCheckpoint):
        writing: list[dict[str, Any]] = []  # its place behind the file that it writes now
        override(saver, WRITES_FILE, partial(_write, saver, writing, getattr(saver, WRITES_FILE)))
        override(saver, "state_dict", partial(_state_of, saver, writing, saver.state_dict))
        override(saver, "load_state_dict", partial(_load, saver, saver.load_state_dict))


def places_of_saves(trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
    """What `remember_saves` adds, by the key of each state: on an exception, before files are written because of it."""
    return {saver.state_key: _place_of(saver) for saver in callbacks_of(trainer, ModelCheckpoint)}


def put_places_into(checkpoint: dict[str, Any], places: dict[str, dict[str, Any]]) -> None:
    """Adds these to a checkpoint that is written after `remember_saves` was undone."""
    states = checkpoint.get("callbacks", {})
    for key in places.keys() & states.keys():
        states[key].setdefault(_KEY, places[key])


def _write(
    saver: ModelCheckpoint,
    writing: list[dict[str, Any]],
    write: Callable[..., None],
    trainer: pl.Trainer,
    *args: Any,
    **kwargs: Any,
) -> None:
    behind = _place_of(saver)
    if not trainer.interrupted:  # by an exception, without which it would not be saved here
        behind |= {"step": trainer.global_step, "waits": behind["waits"] and not trainer.validating}
    writing.append(behind)
    try:
        write(trainer, *args, **kwargs)
    finally:
        writing.pop()


def _state_of(
    saver: ModelCheckpoint, writing: list[dict[str, Any]], state_dict: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    return {**state_dict(), _KEY: writing[-1] if writing else _place_of(saver)}


def _load(saver: ModelCheckpoint, load_state_dict: Callable[[dict[str, Any]], None], state: dict[str, Any]) -> None:
    load_state_dict({name: value for name, value in state.items() if name != _KEY})
    if _KEY in state and state.get("dirpath") == saver.dirpath:  # elsewhere it has no files yet
        setattr(saver, SAVED_AT, state[_KEY]["step"])
        setattr(saver, WAITS, state[_KEY]["waits"])


def _place_of(saver: ModelCheckpoint) -> dict[str, Any]:
    return {"step": getattr(saver, SAVED_AT), "waits": getattr(saver, WAITS, False)}
