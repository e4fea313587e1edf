# SPDX-License-Identifier: Apache-2.0
"""`optkit compare`: one task under several settings, each with several seeds."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningCLI
from rich.console import Console

from lightning_optkit._terminal import announce, width
from lightning_optkit.callbacks import PowerSnapshots, Report, SnapshotEnsemble
from lightning_optkit.cli.bare_names import bare_names
from lightning_optkit.cli.missing_files import about_missing_file
from lightning_optkit.cli.nothing_trained import why_without_batches
from lightning_optkit.cli.quiet_start import LIGHTNINGS_LOGGERS
from lightning_optkit.cli.refused_values import RefusedValue, about_settings, keys_named, with_line
from lightning_optkit.cli.trainer_commands import cli_of_fit, of_user, refuse_unreadable
from lightning_optkit.cli.users_folders import add_users_folders
from lightning_optkit.diagnostics import RunRecord
from lightning_optkit.diagnostics._comparison import comparison_rows, write_comparison
from lightning_optkit.diagnostics._figures import as_label
from lightning_optkit.diagnostics._files import why_unwritable
from lightning_optkit.diagnostics._summary import table_text
from lightning_optkit.recipes import recipe_names, recipe_text

__all__ = ["add_options", "compare"]

_USAGE = "optkit compare --task TASK [--task TASK ...] --tried TRIED [--tried TRIED ...] [options]"
_AS_IT_IS = "as it is"
_WRITE = (Checkpoint, PowerSnapshots, Report, SnapshotEnsemble)
_QUIET = ("logger", "enable_progress_bar", "enable_model_summary")  # checkpoints: a file may name a ModelCheckpoint


def add_options(parser: ArgumentParser) -> None:
    """Files of the task, and what is tried on it."""
    parser.add_argument(
        "--task", type=str, action="append", required=True, help="a file with model, data and trainer; repeatable"
    )
    parser.add_argument(
        "--tried",
        type=str,
        action="append",
        help="a recipe by name, or a file that is put over those of the task; repeatable",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each")
    parser.add_argument("--output", type=str, default="compared.html", help="the page to write")
    parser.add_argument("--title", type=str, default="Comparison", help="its headline")


def compare(options: Namespace) -> None:
    """Runs one task under several settings and seeds: mean and spread, in a table and on a page.

    `optkit compare --task task.yaml --tried mlp --tried mine.yaml --seeds 0 1 2` runs the task as it is, with the
    recipe, and with the file over it, three times each.
    Each is fitted as `optkit fit --config task.yaml --config TRIED --seed_everything SEED` would, without a logger and
    checkpoints; a list of callbacks in a file replaces that of the task. A run that an exception ends after its first
    step is counted as ended early, and the others go on; a setting that fails before it is named and left out, and the
    status is 1, or 2 where its file is wrong. After Ctrl-C, the page has the runs so far.

    Raises:
        ValueError: for a recipe or file that does not exist, a seed given twice, or settings that cannot be built.
        SystemExit: with 2 if nothing is tried or a file is wrong, with 1 if a setting could not be run.
    """
    tried = [_AS_IT_IS, *(options.tried or [])]
    for name, values in (("--tried", tried), ("--seeds", options.seeds)):
        twice = [value for place, value in enumerate(values) if value in values[:place]]
        if twice:
            raise ValueError(f"optkit compare: {name} {twice[0]} is given twice.")
    for path in options.task:
        if Path(path).is_dir():
            raise ValueError(f"optkit compare: --task {path}: it is a folder; give a file.")
        if not Path(path).is_file():
            raise ValueError(f"optkit compare: --task {path}: {about_missing_file(Path(path))}")
    refuse_unreadable([*options.task, *filter(os.path.isfile, tried)], "optkit compare")
    for seed in options.seeds:
        if not 0 <= seed < 2**32:
            raise ValueError(f"optkit compare: --seeds {seed}: a seed must be in [0, 2**32).")
    _check_output(options, tried)
    if len(tried) == 1:
        print(
            "optkit compare: nothing to compare with the task: give --tried at least once, a file or a recipe "
            f"({', '.join(recipe_names())}).",
            file=sys.stderr,
        )
        sys.exit(2)
    console = Console(highlight=False, markup=False)
    not_run: dict[str, int] = {}  # with the status that each would end in
    groups: dict[str, list[RunRecord]] = {}
    add_users_folders([*options.task, *filter(os.path.isfile, tried)])
    with _quiet(), TemporaryDirectory() as folder:
        files = {each: _file_of(each, Path(folder)) for each in tried}
        for name in tried[1:]:  # one that is wrong is found before the first run
            _check_settings(options, name, files[name])
        try:
            for name in tried:
                for seed in options.seeds:
                    announce(f"{name}, seed {seed} ...")
                    try:
                        with _named("the run:", f"{name}, seed {seed}"):
                            record = _fitted([*options.task, *files[name]], seed)
                    except _NotRun as error:
                        not_run[name] = error.status
                        break  # its other seeds would fail as well
                    groups.setdefault(name, []).append(record)
                    console.print(f"{name}, seed {seed}: {_in_words(record)}")
        except BaseException:
            if groups:
                print(f"Of the runs so far: {write_comparison(groups, Path(options.output), title=options.title)}")
            raise
    if groups:
        _show(groups, options)
    if not_run:
        print(f"Not run, as said above: {', '.join(not_run)}.", file=sys.stderr)
        sys.exit(max(not_run.values()))


def _show(groups: dict[str, list[RunRecord]], options: Namespace) -> None:
    print(table_text(comparison_rows(groups), ["", *groups], width()))
    print(f"Report: {write_comparison(groups, Path(options.output), title=options.title)}")


def _check_output(options: Namespace, tried: Sequence[str]) -> None:
    """Before hours of runs, not after them."""
    output, call = Path(options.output), f"optkit compare: --output {options.output}"
    if any(Path(each).resolve() == output.resolve() for each in (*options.task, *tried)):
        raise ValueError(f"{call}: it is one of the files of this comparison, and would be overwritten.")
    reason = why_unwritable(output)
    if reason:
        raise ValueError(f"{call}: {reason}.")


def _check_settings(options: Namespace, name: str, files: Sequence[str]) -> None:
    """Ends for settings that cannot be built; says that it is the task's fault where that alone has the same."""
    tried, task, seed = f"--tried {name}", " ".join(f"--task {each}" for each in options.task), options.seeds[0]
    fault = _fault([*options.task, *files], seed, tried)
    if fault is None:
        return
    alone = _fault(options.task, seed, task)
    is_of_task = alone is not None and alone[0].replace(task, "") == fault[0].replace(tried, "")
    said, status = alone if alone is not None and is_of_task else fault
    sys.stderr.write(said)
    sys.exit(status)


def _fault(files: Sequence[str], seed: int, setting: str) -> tuple[str, Any] | None:
    """What is to be printed of settings that cannot be built, and the status; None for those that can be."""
    printed = StringIO()
    try:
        with redirect_stderr(printed), _named("the settings of", setting):
            _built(files, seed)
    except _NotRun as error:
        return printed.getvalue(), error.status
    except SystemExit as error:
        return printed.getvalue(), error.code
    sys.stderr.write(printed.getvalue())  # warnings, each of which Python gives once
    return None


def _in_words(record: RunRecord) -> str:
    took = f"{record.num_steps:,} step{'s' * (record.num_steps != 1)} in {record.elapsed_s.last or 0:.1f} s"
    if not record.ended:
        return took
    by = as_label(record.ended["by"].splitlines()[0], 200)
    return f"{took}, ended {record.ended['when']}, by {by} ({record.ended['where']})"


def _file_of(tried: str, folder: Path) -> list[str]:
    if tried == _AS_IT_IS:
        return []
    if Path(tried).is_file():
        return [tried]
    if tried not in recipe_names():
        raise ValueError(
            f"optkit compare: --tried {tried}: there is no such file, and no such recipe; recipes are "
            f"{', '.join(recipe_names())}."
        )
    path = folder / f"{tried}.yaml"
    path.write_text(recipe_text(tried), encoding="utf-8")
    return [str(path)]


def _built(files: Sequence[str], seed: int) -> LightningCLI:
    words = [word for file in files for word in ("--config", file)]
    words += ["--seed_everything", str(seed)]
    words += [word for name in _QUIET for word in (f"--trainer.{name}", "false")]
    with bare_names():
        return cli_of_fit(words, {"prog": "optkit compare", "usage": _USAGE})


def _fitted(files: Sequence[str], seed: int) -> RunRecord:
    cli = _built(files, seed)
    trainer: Any = cli.trainer
    report = Report(write=False, verbose=False, layers=False)
    trainer.callbacks = [*(each for each in trainer.callbacks if not isinstance(each, _WRITE)), report]
    with bare_names(), keys_named(cli):
        try:
            trainer.fit(cli.model, datamodule=cli.datamodule)
        except Exception:
            if not report.record.ended or not report.record.num_steps:
                raise
    if not report.record.num_steps:
        reason = why_without_batches(trainer) or "its length is 0"
        raise RefusedValue(f"it took no step: {reason}.")
    return report.record


class _NotRun(Exception):
    """A setting that fails before its first step; what is wrong has been printed."""

    @property
    def status(self) -> int:
        """2 for a file that is wrong."""
        return 2 if isinstance(self.__cause__, RefusedValue) else 1


@contextmanager
def _named(part: str, setting: str) -> Iterator[None]:
    """Says which setting it is that cannot be built or run; `part` of the comparison is its run, or its file."""
    try:
        yield
    except SystemExit:  # of the parser, whose message is printed, or after Ctrl-C
        print(f"optkit compare: it ended in {part} {setting}.", file=sys.stderr)
        raise
    except Exception as error:
        sentence = about_settings(error)
        said = with_line(sentence, error) if sentence else "it ended by this error."
        print(f"optkit compare: {setting}: {said}", file=sys.stderr)
        if sentence is None:
            own = of_user(error)
            own.__context__ = None  # the parser's
            traceback.print_exception(own)
        raise _NotRun from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what each fit says of itself: there are many."""
    loggers = [logging.getLogger(name) for name in LIGHTNINGS_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
