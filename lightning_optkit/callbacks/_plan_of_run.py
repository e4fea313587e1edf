# SPDX-License-Identifier: Apache-2.0
"""How a run steps, as text, for a report."""

import lightning.pytorch as pl

from lightning_optkit.callbacks.fuse import Fuse
from lightning_optkit.callbacks.gradient_clipping import GradientClipping
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.optimizer_names import optimizer_names
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.step import OnePassOptimizer

__all__ = ["clip_of_run", "plan_of_run"]


def plan_of_run(trainer: pl.Trainer) -> str:
    """The plan of each optimizer, and of the norms."""
    parts = []
    for name, optimizer in zip(optimizer_names(trainer), trainer.optimizers, strict=True):
        which = f"{name}: " if len(trainer.optimizers) > 1 else ""
        if isinstance(optimizer, OnePassOptimizer):
            parts.append(f"{which}{optimizer.explain()}")
        else:
            kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
            parts.append(f"{which}{kind}: its own step; nothing is folded into it")
    parts += [line for fuse in callbacks_of(trainer, Fuse) for line in fuse.norm_lines()]
    return "\n\n".join(parts)


def clip_of_run(trainer: pl.Trainer) -> str:
    """The clip of the steps, inside of them or before."""
    folded = [optimizer.clip for optimizer in trainer.optimizers if isinstance(optimizer, OnePassOptimizer)]
    apart = [each.clip for each in callbacks_of(trainer, GradientClipping)]
    of_trainer = Run(trainer).clip
    clips = [clip for clip in folded if clip is not None] or apart
    texts = [repr(clip) for clip in clips] or ([repr(of_trainer)] if of_trainer is not None else [])
    return ", ".join(dict.fromkeys(texts))
