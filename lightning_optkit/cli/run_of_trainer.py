# SPDX-License-Identifier: Apache-2.0
"""LightningCLI of `optkit fit`, `validate`, `test`, `predict`: says whose weights it has, and keeps predictions."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optkit.cli.given_checkpoint import SaysWhichWeights, check_given, damage_of_given, short
from lightning_optkit.cli.nothing_trained import SaysNothingTrained
from lightning_optkit.cli.refused_values import CLIWithKeys
from lightning_optkit.cli.saved_arguments import replaced_values, with_arguments

__all__ = ["RunOfTrainer"]


class RunOfTrainer(CLIWithKeys):
    """The run of a command, from its arguments to its end."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Holds back a damaged checkpoint, whose hyperparameters are read next: SafeCheckpointIO takes another one."""
        super().parse_arguments(parser, args)
        self._words = args if isinstance(args, list) else []
        options = self.config[self.config.subcommand]
        self._given = options.get("ckpt_path")
        self._damage = damage_of_given(self._given)
        if self._damage:
            options.ckpt_path = None

    def _parse_ckpt_path(self) -> None:
        """Takes the hyperparameters of a fit in Python, too, which name no class; says what they replace."""
        options = self.config[self.config.subcommand]
        if options.get("ckpt_path") and Path(options.ckpt_path).is_file():
            before = options.model.clone()
            self.config = with_arguments(self.parser, self.config, options.ckpt_path)
            for sentence in replaced_values(before, self.config[self.config.subcommand].model, self._words):
                rank_zero_warn(sentence)

    def before_instantiate_classes(self) -> None:
        """The checkpoint is back, for the Trainer and the file that is saved."""
        if self._damage:
            self.config[self.subcommand].ckpt_path = self._given

    def before_fit(self) -> None:
        """Looks at the checkpoint."""
        trainer: Any = self.trainer
        check_given(trainer, self._given, self._damage)
        trainer.callbacks[:0] = [SaysNothingTrained(), SaysWhichWeights(self._given)]

    before_validate = before_test = before_predict = before_fit

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
