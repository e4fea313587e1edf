# SPDX-License-Identifier: Apache-2.0
"""What a process has at a save besides random numbers and its position: metrics, gradients, buffers, steps due, and
what it has switched in its module.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl

from lightning_optkit.callbacks._cut_epoch import CutEpoch
from lightning_optkit.callbacks._gradients_of_processes import Gradients, set_gradients
from lightning_optkit.callbacks._metrics_so_far import metrics_so_far, set_metrics
from lightning_optkit.callbacks._open_window import OpenWindow
from lightning_optkit.callbacks._own_buffers import buffers_of, set_buffers
from lightning_optkit.callbacks._plateau_steps import steps_due, take_steps
from lightning_optkit.callbacks._switches import Switches

__all__ = ["give_back_parts", "parts_of_process"]


def parts_of_process(
    trainer: pl.Trainer,
    window: OpenWindow,
    cut: CutEpoch | None,
    switches: Switches | None,
    is_unfinished: bool,
    computes: bool,
) -> dict[str, Any]:
    """Those of now; of an epoch that a stop has cut, those before its last hooks.

    Args:
        trainer: The Trainer, within a fit.
        window: The gradients of the open accumulation window.
        cut: What the stop has changed, if there was one.
        switches: Those of the module, None before the fit has begun.
        is_unfinished: Whether a run that is resumed repeats the current batch.
        computes: Whether metrics may be computed: all processes take part in that.
    """
    measured = partial(metrics_so_far, trainer, computes, window.sums if is_unfinished else None)
    return {
        "metrics": cut.metrics(measured) if cut else measured(),
        "due": steps_due(trainer, computes),
        "gradients": cut.gradients if cut else window.gradients(trainer, is_unfinished),
        "buffers": buffers_of(trainer),
        "switches": switches.changed() if switches else {},
    }


def give_back_parts(
    trainer: pl.Trainer,
    switches: Switches,
    saved: dict[str, Any],
    gradients: list[Gradients | None],
    override: Callable[[object, str, Callable[..., Any]], None],
) -> dict[str, Any]:
    """Restores them, and returns the sums to which no batch has been added yet: to be cleared when the epoch ends.

    Args:
        trainer: The Trainer, before its first batch.
        switches: Those of its module.
        saved: The result of `parts_of_process`; older versions have fewer.
        gradients: Those that each process has saved.
        override: Replaces a method for the rest of the fit.
    """
    switches.give_back(saved.get("switches", {}))
    set_gradients(trainer.lightning_module, saved["gradients"], gradients)
    set_buffers(trainer, saved.get("buffers", {}), saved.get("replaced", True))
    if "metrics" not in saved:
        return {}
    sums = set_metrics(trainer, saved["metrics"], override)
    take_steps(trainer, saved["due"])
    return sums
