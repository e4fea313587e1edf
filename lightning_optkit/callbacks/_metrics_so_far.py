# SPDX-License-Identifier: Apache-2.0
"""What a run has measured at a checkpoint, which Lightning does not save: an epoch's means are of all its batches."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_optkit.callbacks.seams.lightning_private import (
    UPDATE_RESULT,
    epoch_progress,
    held_by,
    is_in_last_hook,
    last_metrics,
    result_of,
    set_sums,
    sums_of,
    training_results,
)

__all__ = ["held_sums", "metrics_so_far", "set_metrics"]


def held_sums(trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
    """The sums of this epoch as they are now, by hook and name."""
    results = training_results(trainer)
    return {key: held_by(result) for key, result in results.items() if result.is_tensor and not result.has_reset}


def metrics_so_far(
    trainer: pl.Trainer, computes: bool = False, held: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """The metrics last computed, and the sums of this epoch: of numbers, since torchmetrics keeps its own.

    At an epoch's end, in its last hooks or behind them, there are no sums: the next begins anew.

    Args:
        trainer: The Trainer.
        computes: Whether the means of an epoch that ends may be computed: all processes take part in that.
        held: The sums before the current batch, if a run that is resumed repeats it.
    """
    epochs = epoch_progress(trainer).current
    is_over = epochs.processed == epochs.started
    is_known = is_in_last_hook(trainer) or (computes and is_over)  # those of the batch, or of the epoch
    known = trainer.callback_metrics if is_known else last_metrics(trainer)
    results = {} if is_over else training_results(trainer)
    if held is None:
        sums = {key: sums_of(result) for key, result in results.items()}
    else:
        sums = {key: sums_of(result, held[key]) for key, result in results.items() if key in held}
    last = {name: torch.as_tensor(value).detach().cpu() for name, value in known.items()}
    return {"last": last, "sums": {key: each for key, each in sums.items() if each is not None}}


def set_metrics(
    trainer: pl.Trainer, saved: dict[str, Any], override: Callable[[object, str, Callable[..., Any]], None]
) -> dict[str, Any]:
    """Restores them, and returns the sums to which no batch has been added yet: to be cleared when the epoch ends.

    Args:
        trainer: The Trainer, before its first batch.
        saved: The result of `metrics_so_far`.
        override: Replaces a method for the rest of the fit.
    """
    device, results = trainer.strategy.root_device, training_results(trainer)
    last_metrics(trainer).update({name: value.to(device) for name, value in saved["last"].items()})
    left = dict(saved["sums"])
    for key, each in left.items():
        results[key] = result_of(trainer, each)
    log, update = results.log, getattr(results, UPDATE_RESULT)  # type: ignore[attr-defined]
    reset: Callable[..., None] = results.reset  # type: ignore[attr-defined]

    def log_(fx: str, name: str, *args: Any, **kwargs: Any) -> None:
        if f"{fx}.{name}" in left:
            results.pop(f"{fx}.{name}", None)  # it is made anew with the arguments of this run
        log(fx, name, *args, **kwargs)

    def update_(key: str, *args: Any) -> None:
        if key in left:
            set_sums(results[key], left.pop(key))
        update(key, *args)

    def reset_(metrics: bool | None = None, fx: str | None = None) -> None:
        reset(metrics, fx)
        if fx is not None:  # of this hook, before what it logs in the first batch of this fit; else an epoch has ended
            for key, each in left.items():
                if key in results and results[key].meta.fx == fx:
                    set_sums(results[key], each)

    if left:
        override(results, "reset", reset_)
        override(results, "log", log_)
        override(results, UPDATE_RESULT, update_)
    return left
