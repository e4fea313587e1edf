# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with an average, resumed without the callback that takes it: training goes on from trained weights.

The `state_dict` of such a checkpoint holds the average, so Lightning would go on from that, with moments that belong to
the trained weights, which stand beside it.
"""

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.checkpointed_weights import forget_trained, holds_trained, load_trained
from lightning_optkit.callbacks.seams.saved_stages import leave_to_callback
from lightning_optkit.step import OnePassOptimizer

__all__ = ["drop_averages", "go_on_from_trained"]

_AVERAGING = ("WeightAveraging", "ScheduleFreeWrapper")  # Lightning's WeightAveraging saves under the same name
_STATES = ("ema", "power_ema", "swa", "lawa")


def go_on_from_trained(trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Loads the trained weights and says that the average is lost, if the run has no callback for it.

    Every callback may call it when a fit loads a checkpoint: it does so once. Every process must call it.
    """
    names = {cls.__name__ for each in callbacks_of(trainer, object) for cls in type(each).__mro__}
    states = checkpoint.get("callbacks", {})
    kinds = {key: str(key).split("{")[0] for key in states}
    lost = [key for key, kind in kinds.items() if kind in _AVERAGING and kind not in names]
    if not lost and (names.intersection(_AVERAGING) or not holds_trained(checkpoint)):
        return
    leave_to_callback(checkpoint, "average")
    has_trained = holds_trained(checkpoint)
    kept = [states.pop(key) for key in lost]
    for points in [each["y"] for each in kept if isinstance(each, dict) and "y" in each]:
        pl_module.load_state_dict({**pl_module.state_dict(), **points}, strict=pl_module.strict_loading)
        has_trained = True
    load_trained(trainer, pl_module, checkpoint)
    held = [each.get("name") for each in kept if isinstance(each, dict)]
    # Optimizers of this package know which average they keep.
    drop_averages(trainer, checkpoint, [name for name in (*held, *_STATES) if name], of_one_pass=False)
    forget_trained(checkpoint)
    whose = str(lost[0]).split("{")[0] if lost else "the callback that averaged the weights"
    from_trained = "the run goes on from the trained weights, not from the average in its state_dict, and "
    rank_zero_warn(
        f"{whose}: the checkpoint was saved with it, and this run leaves it out; {from_trained if has_trained else ''}"
        "the average is lost: give the same callback to keep it."
    )


def drop_averages(
    trainer: pl.Trainer, checkpoint: dict[str, Any], names: Iterable[str], *, of_one_pass: bool = True
) -> None:
    """Takes averages out of the states, from which a later run with the callback would go on as if none was lost.

    FSDP2 has loaded its optimizers already, others load them next.

    Args:
        trainer: The Trainer.
        checkpoint: The checkpoint that it loads.
        names: Names in the state.
        of_one_pass: Also out of saved states of this package's optimizers.
    """
    every = [each for each in checkpoint.get("optimizer_states", []) if isinstance(each, dict)]
    saved = [each for each in every if of_one_pass or "rule" not in each]
    loaded = [each.state for each in trainer.optimizers if not isinstance(each, OnePassOptimizer)]
    for states in (*(each.get("state", {}) for each in saved), *loaded):
        for entries in states.values():
            if isinstance(entries, dict):
                _drop(entries, names)


def _drop(entries: dict[str, Any], names: Iterable[str]) -> None:
    """Removes averages with their counters; an entry of that name without one is a rule's own."""
    found: list[str] = []
    for name in names:
        counter = f"num_averaged_{name}" if f"num_averaged_{name}" in entries else "num_averaged"
        held = [key for key in entries if key == name or str(key).startswith(f"{name}_snapshot_")]
        found += [*held, counter] if held and counter in entries else []
    for key in found:
        entries.pop(key, None)
