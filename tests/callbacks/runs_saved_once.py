# SPDX-License-Identifier: Apache-2.0
"""Runs of three epochs with a validation every three batches, saved once at a chosen place and resumed from there."""

import lightning.pytorch as pl

from lightning_optkit.callbacks import ExactResume


class Saves(pl.Callback):
    """Saves in a hook, the first time that its epoch, or epoch and batch if it is given one, is among `places`."""

    def __init__(self, path, hook, *places):
        self.path, self.places = path, places
        setattr(self, hook, self.save)

    def save(self, trainer, pl_module, *batch):
        if (trainer.current_epoch, *batch[2:]) in self.places and not self.path.exists():
            trainer.save_checkpoint(self.path)


def trainer(*callbacks):
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        val_check_interval=3,
        num_sanity_val_steps=0,
        callbacks=[ExactResume(), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
