# SPDX-License-Identifier: Apache-2.0
"""Where the first infinite or NaN number of a run comes from, once a loss is not finite."""

import math
from typing import Any, Literal

import lightning.pytorch as pl

from lightning_optkit.callbacks.seams.lightning_packages import loss_scaler
from lightning_optkit.callbacks.seams.lightning_private import is_compiled
from lightning_optkit.callbacks.seams.replay import replayed_loss
from lightning_optkit.diagnostics._observations import Losses, NonfiniteSeen
from lightning_optkit.diagnostics.measure.batches import nonfinite_part
from lightning_optkit.diagnostics.measure.modules import FirstNonfinite
from lightning_optkit.diagnostics.measure.parameters import layer_of, plain_name

__all__ = ["first_nonfinite"]


def first_nonfinite(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, step: int, losses: Losses
) -> NonfiniteSeen:
    """Looks at the batch, then at the weights, then runs the batch once more and looks at each module in turn.

    Under manual optimization, in several processes and for a compiled module, the batch is not run again.
    """
    rise, is_scaled, is_alone = _rise(losses), loss_scaler(trainer) is not None, trainer.world_size == 1
    part = nonfinite_part(batch)
    if part is not None:
        return NonfiniteSeen(step, "batch", None, f"infinite or NaN: {part} of the batch", 1.0, is_scaled)
    params = dict(pl_module.named_parameters())
    bad = [name for name, p in params.items() if not bool(p.detach().isfinite().all())]
    if bad:
        detail = f"{len(bad)} of {len(params)} parameters are infinite or NaN after step {max(step - 1, 0)}"
        # A gradient that is not finite passes on to the layers before it; those behind it stay finite.
        layer = layer_of(bad[-1]) or plain_name(bad[-1]) if len(bad) < len(params) else None
        more = f", {plain_name(bad[-1])} the last of them" if layer else ""
        came_from: Literal["gradient", "process"] = "gradient" if is_alone else "process"
        return NonfiniteSeen(max(step - 1, 0), came_from, layer, detail + more, rise, is_scaled)
    watch = FirstNonfinite(pl_module)
    try:
        if pl_module.automatic_optimization and is_alone and not is_compiled(pl_module):
            replayed_loss(trainer, pl_module, batch, batch_idx)
    finally:
        watch.close()
    if watch.name is not None:
        where: Literal["before", "forward"] = "before" if watch.is_before else "forward"
        return NonfiniteSeen(step, where, watch.name, watch.detail, rise, is_scaled)
    of = "" if is_alone else " that this process has"
    detail = f"the loss is infinite or NaN, the batch and all weights{of} are finite"
    return NonfiniteSeen(step, "loss", None, detail, rise, is_scaled)


def _rise(losses: Losses) -> float:
    finite = [loss for loss in losses.recent if math.isfinite(loss)]
    if not finite or min(finite) <= 0:
        return 1.0
    return finite[-1] / min(finite)
