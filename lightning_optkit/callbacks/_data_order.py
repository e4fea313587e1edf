# SPDX-License-Identifier: Apache-2.0
"""The facts that the order of the training data depends on, in plain types, so that two runs can be compared."""

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len

from lightning_optkit.callbacks.batch_size_schedule import BatchSizeSchedule
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.lightning_private import HasState
from lightning_optkit.callbacks.seams.random_state import own_generators

__all__ = ["data_order", "differences", "num_workers", "what_workers_lose"]


def data_order(trainer: pl.Trainer, loaders: list[Any]) -> dict[str, Any]:
    """The facts by name; empty if the loaders are recreated during a run, since they may then differ each time."""
    if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        return {}
    facts = {
        "loaders": len(loaders),
        "samples": [sized_len(getattr(loader, "dataset", loader)) for loader in loaders],
        "sampler": [_kind(loader) for loader in loaders],
        "drop_last": [getattr(loader, "drop_last", None) for loader in loaders],
        "own generators": len([*own_generators(loaders)]),
        "batch size": [getattr(loader, "batch_size", None) for loader in loaders],
        "batches per epoch": trainer.num_training_batches,
    }
    if callbacks_of(trainer, BatchSizeSchedule):
        del facts["batch size"], facts["batches per epoch"]  # the schedule sets and compares them itself
    return facts


def num_workers(loaders: list[Any]) -> list[int]:
    """Number of workers of each loader, which affects only random numbers drawn by a dataset."""
    return [getattr(loader, "num_workers", 0) for loader in loaders]


def what_workers_lose(trainer: pl.Trainer, loaders: list[Any], before: dict[str, Any]) -> list[str]:
    """Why the random numbers of workers are not those of one long run, each to follow "ExactResume: "."""
    lost = []
    if changed := differences(before, {"num_workers": num_workers(loaders)}):
        lost.append(f"the run was saved with {changed}; what its data set draws is not exact.")
    if any(getattr(loader, "persistent_workers", False) for loader in loaders) and trainer.current_epoch:
        lost.append("random numbers drawn inside persistent workers are not those of one long run.")
    if any(isinstance(loader, HasState) and num_workers([loader])[0] for loader in loaders):
        lost.append("a loader that restores itself does not restore what its workers draw.")
    return lost


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The differing facts, as text; empty if there are none."""
    names = [name for name in now if name in before and before[name] != now[name]]
    saved, resumed = (", ".join(f"{name} {_plain(facts[name])}" for name in names) for facts in (before, now))
    return f"{saved} and goes on with {resumed}" if names else ""


def _kind(loader: Any) -> str:
    """The sampler and its settings."""
    sampler = getattr(loader, "sampler", None)
    if getattr(loader, "batch_size", None) is None and getattr(loader, "batch_sampler", None) is not None:
        sampler = loader.batch_sampler
    flags = [f"{name}={getattr(sampler, name)}" for name in ("shuffle", "replacement") if hasattr(sampler, name)]
    return f"{type(sampler).__name__}({', '.join(flags)})"


def _plain(fact: Any) -> Any:
    return fact[0] if isinstance(fact, list) and len(fact) == 1 else fact
