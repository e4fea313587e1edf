# SPDX-License-Identifier: Apache-2.0
"""Which weights a command of a Trainer has, where `--ckpt_path` does not lead to a checkpoint."""

import traceback
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optkit.callbacks.seams.gathered_shards import is_sharded
from lightning_optkit.callbacks.seams.other_weights import with_advice
from lightning_optkit.callbacks.seams.whole_checkpoints import NO_CHECKPOINT, damage_of

__all__ = ["SaysWhichWeights", "about_checkpoint", "check_given", "damage_of_given", "short"]


def damage_of_given(given: str | Path | None) -> str:
    """What is wrong with the file, in a few words; empty for a whole one, and for what is no file."""
    return damage_of(Path(given)) if given and Path(given).is_file() else ""


def check_given(trainer: pl.Trainer, given: str | Path | None, damage: str) -> None:
    """Refuses what no Trainer could load.

    Args:
        trainer: The Trainer that would load it.
        given: The value of `--ckpt_path`.
        damage: What is wrong with the file, if it is one.

    Raises:
        ValueError: for a damaged file, if no plugin such as SafeCheckpointIO reads it; for a folder that is no sharded
            checkpoint; for "best", which only the process of a fit knows.
    """
    if damage and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        raise ValueError(f"--ckpt_path {given}: {damage}; give a checkpoint that a Trainer saved, or none.")
    if given and Path(given).is_dir() and not is_sharded(Path(given)):
        raise ValueError(f"--ckpt_path {given}: {NO_CHECKPOINT}{_there_are(trainer)}")
    if given == "best" and not getattr(trainer.checkpoint_callback, "best_model_path", ""):
        raise ValueError(f"--ckpt_path best: only the process of a fit knows it; give a path.{_there_are(trainer)}")


def about_checkpoint(error: BaseException) -> str | None:
    """What Lightning or torch said of a checkpoint that does not fit, with what to do; None for any other error."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, KeyError) and error.args == ("pytorch-lightning_version",):
        return "the file of --ckpt_path is no checkpoint of Lightning; give a file that a Trainer saved."
    is_loading = any(frame.name == "load_model_state_dict" for frame in frames)  # not one that the user's module loads
    if is_loading and isinstance(error, RuntimeError) and str(error).startswith("Error(s) in loading state_dict"):
        return with_advice(str(error), "the model")
    return None


class SaysWhichWeights(pl.Callback):
    """When a run begins without a checkpoint: an evaluation of weights that are not trained looks like any other."""

    def __init__(self, given: str | Path | None) -> None:
        self.given = given

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says that "last" has found nothing, unless this is the first run."""
        if self.given == "last" and trainer.ckpt_path is None and _there_are(trainer):
            rank_zero_warn(f"{self._no_last(trainer)} The fit begins anew.")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says whose weights these are.

        Raises:
            ValueError: if "last" has found nothing.
        """
        if trainer.state.fn == TrainerFn.FITTING or trainer.ckpt_path is not None:
            return
        if self.given == "last":
            raise ValueError(self._no_last(trainer))
        rank_zero_warn(
            f"No --ckpt_path is given: the weights are those that {type(pl_module).__name__} is built with."
            f"{_there_are(trainer)}"
        )

    on_test_start = on_predict_start = on_validation_start

    @staticmethod
    def _no_last(trainer: pl.Trainer) -> str:
        own = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint) and each.dirpath]
        where = f" in {short(Path(str(own[0].dirpath)))}, where this run saves" if own else ""
        return (
            f"--ckpt_path last: there is none{where}; give a path, or ModelCheckpoint a dirpath that all runs share."
            f"{_there_are(trainer)}"
        )


def _there_are(trainer: pl.Trainer) -> str:
    """The last run's checkpoints, the newest first; empty if none is found."""
    saved = {path: path.stat().st_mtime for folder in _folders(trainer) for path in folder.glob("**/*.ckpt")}
    newest = sorted(saved, key=lambda path: saved[path], reverse=True)
    beside = [short(path) for path in newest if path.parent == newest[0].parent]
    more = f" and {len(beside) - 3} more" if len(beside) > 3 else ""
    return f" The newest: {', '.join(beside[:3])}{more}." if beside else ""


def _folders(trainer: pl.Trainer) -> Iterator[Path]:
    """Where runs of these settings save."""
    for logger in trainer.loggers:
        yield Path(logger.save_dir or trainer.default_root_dir, str(logger.name or ""))
    yield Path(trainer.default_root_dir, "checkpoints")
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            yield Path(callback.dirpath)


def short(path: Path) -> str:
    """As seen from the current folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
