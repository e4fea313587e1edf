# SPDX-License-Identifier: Apache-2.0
"""`optkit fit`, `validate`, `test`, `predict`, `explain`, `find-lr`, `doctor`: LightningCLI that knows this package."""

import contextlib
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import lightning
import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_optkit.cli.bare_names import bare_names
from lightning_optkit.cli.doctor_command import doctor_of
from lightning_optkit.cli.first_batch import explain, find_lr
from lightning_optkit.cli.losses import about_loss
from lightning_optkit.cli.main import TRAINER_COMMANDS
from lightning_optkit.cli.missing_files import about_missing_file
from lightning_optkit.cli.near_options import about_option
from lightning_optkit.cli.quiet_start import quiet_start
from lightning_optkit.cli.refused_values import CLIWithKeys, RefusedValue, about_settings, keys_named, with_line
from lightning_optkit.cli.run_of_trainer import RunOfTrainer
from lightning_optkit.cli.users_folders import add_users_folders
from lightning_optkit.cli.wrong_names import ParserWithNearNames
from lightning_optkit.diagnostics._rate_trials import TRAINED
from lightning_optkit.diagnostics.lr_range import RULES

__all__ = ["cli_of_fit", "of_user", "refuse_unreadable", "run"]

_PACKAGE = str(Path(__file__).parents[1])
_PARSER = str(Path(jsonargparse.__file__).parent)
_LIGHTNING = str(Path(lightning.__file__).parent)
_AROUND = (_PACKAGE, _PARSER, _LIGHTNING, str(Path(torch.__file__).parent), contextlib.__file__, "<frozen ")
_MORE = {
    "fit": "optkit fit --config config.yaml --trainer.max_epochs 3; in the file, `class_path: Fuse` is enough; a name "
    "that torch or Lightning has as well (AdamW, WeightAveraging) is ours as lightning_optkit.AdamW. Models and data "
    "are looked up in the current folder, too, and in that of the file.",
}


class _BeforeTheFirstBatch(CLIWithKeys):
    """The run as `fit` would start it; takes the options of `fit`, so that its files can be given."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_method_arguments(
            self.trainer_class, "fit", skip={"model", "train_dataloaders", "val_dataloaders", "datamodule"}
        )

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Without a logger: nothing is trained, and Lightning would recommend several."""
        return super().instantiate_trainer(**{"logger": False, **kwargs})


class _RangeTest(_BeforeTheFirstBatch):
    """The same with the options of `find-lr`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--suggestion",
            choices=(*RULES, TRAINED),
            help="the rule whose rate is suggested; trained: by short trainings at some 10 rates. Default: that of the "
            "LRFinder of the file, or middle",
        )


class _OneBatch(_BeforeTheFirstBatch):
    """The same with the options of `doctor`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--max_steps", type=int, default=300, help="steps on the first batch, at most; 32 or more")
        parser.add_argument("--max_seconds", type=float, default=30.0, help="the same in time; above 0")
        parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(command: str, words: Sequence[str], program: str) -> None:
    """Runs one of `TRAINER_COMMANDS`.

    Args:
        command: Its name.
        words: The arguments behind it.
        program: What the user called, for messages.

    Raises:
        SystemExit: with 2 for arguments or files that are wrong, with 1 and a sentence for a run that cannot be done.
    """
    add_users_folders(_files_of(words))
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # it is what we have
    summary = " ".join([TRAINER_COMMANDS[command], *filter(None, [_MORE.get(command)])])
    try:
        refuse_unreadable(_files_of(words), f"{program} {command}")
        with bare_names():
            _run(command, [*words], program, summary)
    except RefusedValue as error:
        _end_with(2, f"{program} {command}: {error}")
    except Exception as error:
        sentence = about_settings(error) or (about_loss(error) if command in _FIRST_BATCH else None)
        if sentence is not None and sentence.startswith("doctor("):  # the function that the command is
            _end_with(2, f"{program} {about_option(command, sentence, ('doctor',))}")
        if sentence is None:
            own = of_user(error)  # with its own traceback, not that of the parser that called it
            if command in _FIRST_BATCH and not _is_of_package(own):
                sys.exit(f"{_frames_of_user(own)}\n{program} {command}: it ended by this error.")
            raise own from own.__cause__
        sys.exit(f"{program} {command}: {with_line(sentence, error)}")


def _end_with(status: int, sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    sys.exit(status)


def _run(command: str, words: list[str], program: str, summary: str) -> None:
    usage = f"{program} {command} --config CONFIG [--config CONFIG ...] [options]"
    if command not in _FIRST_BATCH:
        of_command = {"description": summary, "usage": usage}
        saved_as = "config" if command == "fit" else command
        RunOfTrainer(
            args=[command, *words],
            parser_class=ParserWithNearNames,
            parser_kwargs={"prog": program, "usage": usage, command: of_command},
            # Without a logger it is in the current folder, where the user's own config.yaml, or that of a fit, may be.
            save_config_kwargs={"config_filename": f"optkit_{saved_as}.yaml", "overwrite": True},
        )
        return
    parser_kwargs: dict[str, Any] = {"prog": f"{program} {command}", "description": summary, "usage": usage}
    kind = {"doctor": _OneBatch, "find-lr": _RangeTest}.get(command, _BeforeTheFirstBatch)
    with quiet_start(prints_ours=command == "explain"):
        cli = _before_a_run(kind, words, parser_kwargs)
        with keys_named(cli):
            _FIRST_BATCH[command](cli)


def cli_of_fit(words: Sequence[str], parser_kwargs: dict[str, Any]) -> LightningCLI:
    """Trainer, model and data of the arguments of `fit`, before the fit."""
    return _before_a_run(_BeforeTheFirstBatch, [*words], parser_kwargs)


def _before_a_run(kind: type[LightningCLI], words: list[str], parser_kwargs: dict[str, Any]) -> LightningCLI:
    return kind(
        run=False,
        args=words,
        parser_class=ParserWithNearNames,
        parser_kwargs=parser_kwargs,
        save_config_callback=None,
    )


_FIRST_BATCH: dict[str, Callable[[LightningCLI], None]] = {"explain": explain, "find-lr": find_lr, "doctor": doctor_of}


def of_user(error: BaseException) -> BaseException:
    """What the user's class raised, where jsonargparse has wrapped it into an error about types; else `error`."""
    each: BaseException | None = error
    while each is not None:
        frames = traceback.extract_tb(each.__traceback__)
        if frames and not frames[-1].filename.startswith(_PARSER):
            return each
        each = each.__cause__ or each.__context__
    return error


def _is_of_package(error: BaseException) -> bool:
    """Whether it is a mistake of this package, which needs the whole traceback."""
    # A function of torch that is watched is called from there, and has no frame of its own.
    frames = [each for each in traceback.extract_tb(error.__traceback__) if each.name != "__torch_function__"]
    return frames[-1].filename.startswith(_PACKAGE)


def _frames_of_user(error: BaseException) -> str:
    """Its traceback without what Lightning, torch and we do around the user's code, which is some 30 frames."""
    shown = traceback.TracebackException.from_exception(error)
    each: traceback.TracebackException | None = shown
    while each is not None:
        each.stack = traceback.StackSummary.from_list(
            [frame for frame in each.stack if not frame.filename.startswith(_AROUND)]
        )
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    whole = shown.format() if shown.stack else shown.format_exception_only()
    return "".join(whole).rstrip()


def refuse_unreadable(files: Sequence[str], call: str) -> None:
    """Files that the parser would stumble over.

    Raises:
        SystemExit: with 2, after a sentence.
    """
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            reason = "it is no text in UTF-8, as a configuration must be."
        except FileNotFoundError:
            path = Path(file).expanduser()
            if path.exists() or not isinstance(_value_of(file), str):  # the parser takes the text of one, too
                continue
            reason = about_missing_file(path)
        except OSError:  # the parser says so
            continue
        else:
            reason = _syntax(text) if text.strip() else "it is empty; a configuration has at least a model."
        if reason:
            _end_with(2, f"{call}: {file}: {reason}")


def _value_of(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _syntax(text: str) -> str:
    """What is wrong with the text as YAML, and where; empty if nothing is."""
    try:
        for _ in yaml.parse(text):
            pass
    except yaml.MarkedYAMLError as error:
        if error.problem and error.problem_mark:
            place = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
            return f"it cannot be read at {place}: {error.problem}; look at the indentation and the brackets there."
    return ""


def _files_of(words: Sequence[str]) -> list[str]:
    """The files behind `--config` and `-c`."""
    behind = [after for word, after in pairwise(words) if word in ("--config", "-c")]
    return behind + [word.partition("=")[2] for word in words if word.startswith(("--config=", "-c="))]
