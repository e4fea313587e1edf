# SPDX-License-Identifier: Apache-2.0
"""LightningCLI of `optkit fit`, `validate`, `test`, `predict`: says whose weights it has, and keeps predictions."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optkit.callbacks import Report
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.cli.given_checkpoint import SaysWhichWeights, check_given, damage_of_given, short
from lightning_optkit.cli.nothing_trained import SaysNothingTrained, why_without_batches
from lightning_optkit.cli.refused_values import CLIWithKeys, RefusedValue
from lightning_optkit.cli.saved_arguments import replaced_values, with_arguments

__all__ = ["RunOfTrainer"]


class RunOfTrainer(CLIWithKeys):
    """The run of a command, from its arguments to its end."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Takes the arguments of the model from a checkpoint, unless it is damaged: SafeCheckpointIO takes another one.

        Held back from LightningCLI, which knows only those that a fit of its own has saved, with their class.
        """
        super().parse_arguments(parser, args)
        command = self.config.subcommand
        self._given = self.config[command].get("ckpt_path")
        self._damage = damage_of_given(self._given)
        if not self._given:
            return
        if Path(self._given).is_file() and not self._damage:
            before = self.config[command].model
            self.config = with_arguments(parser, self.config, self._given)
            after, words = self.config[command].model, args if isinstance(args, list) else []
            for sentence in replaced_values(before, after, words):
                rank_zero_warn(sentence)
        self.config[command].ckpt_path = None

    def before_instantiate_classes(self) -> None:
        """The checkpoint is back, for the Trainer and the file that is saved."""
        if self._given:
            self.config[self.subcommand].ckpt_path = self._given

    def before_fit(self) -> None:
        """Looks at the checkpoint."""
        trainer: Any = self.trainer
        check_given(trainer, self._given, self._damage)
        trainer.callbacks.append(SaysWhichWeights(self._given))
        if reports := callbacks_of(trainer, Report):
            trainer.callbacks.insert(trainer.callbacks.index(reports[0]), SaysNothingTrained())
        else:
            trainer.callbacks.append(SaysNothingTrained())

    before_validate = before_test = before_predict = before_fit

    def after_fit(self) -> None:
        """Refuses data of which nothing could be trained: Lightning ends such a fit like any other."""
        if reason := why_without_batches(self.trainer):
            raise RefusedValue(f"data: nothing was trained: {reason}.")

    def predict(self, **kwargs: Any) -> None:
        """Predicts, and keeps what `predict_step` returned, unless a callback writes it."""
        trainer: Any = self.trainer
        predictions = trainer.predict(**kwargs)
        if any(isinstance(each, BasePredictionWriter) for each in trainer.callbacks):
            return
        if predictions is None:
            rank_zero_warn(
                "The predictions are not kept: return_predictions is false, and no BasePredictionWriter is given."
            )
            return
        of_process = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = Path(trainer.log_dir or trainer.default_root_dir, f"predictions{of_process}.pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(predictions, path)
        print(f"Predictions: {short(path)}, a list of what predict_step returned, for torch.load.")
