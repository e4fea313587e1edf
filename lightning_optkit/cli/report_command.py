# SPDX-License-Identifier: Apache-2.0
"""`optkit report`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_optkit._terminal import width
from lightning_optkit.diagnostics import RunRecord
from lightning_optkit.diagnostics._files import why_unwritable
from lightning_optkit.diagnostics._saved_runs import saved_runs
from lightning_optkit.diagnostics._summary import summary_text, table_text
from lightning_optkit.diagnostics.report import result_rows, write_report

__all__ = ["add_options", "report"]

_FEW = 100  # bytes, within which a file may hold nothing but blank lines


def add_options(parser: ArgumentParser) -> None:
    """The files stand by themselves."""
    parser.add_argument(
        "paths",
        nargs="+",
        type=str,
        help="report.json or a checkpoint of a run with Report, metrics.csv of CSVLogger, or folders that hold them",
    )
    parser.add_argument("--output", type=str, default="report.html", help="the page to write")
    parser.add_argument("--title", type=str, default="Training report", help="its headline")


def report(options: Namespace) -> None:
    """Puts runs that are over on one page, side by side, and prints their results.

    `optkit report lightning_logs --output all.html` takes every run below that folder;
    `optkit report a/report.json b/metrics.csv` these two. A record of Report has everything, a log only curves.

    Raises:
        ValueError: for a page that cannot be written.
        SystemExit: with 2 for a path without a run.
    """
    if any(Path(path).is_file() and Path(path).resolve() == Path(options.output).resolve() for path in options.paths):
        raise ValueError(f"optkit report: --output {options.output}: it is one of the runs, and would be overwritten.")
    reason = why_unwritable(Path(options.output))
    if reason:
        raise ValueError(f"optkit report: --output {options.output}: {reason}.")
    try:
        runs = _runs(options.paths)
    except (ValueError, FileNotFoundError) as error:
        print(f"optkit report: {error}", file=sys.stderr)
        sys.exit(2)
    output = write_report(runs, Path(options.output), title=options.title)
    if len(runs) == 1:
        print(summary_text(runs[0], width()))
    else:
        print(table_text(result_rows(runs), ["", *(run.name for run in runs)], width()))
    print(f"Report: {output}")


def _runs(paths: Sequence[str]) -> list[RunRecord]:
    if not all(paths):
        raise ValueError("one of the paths is empty; is a variable of the shell not set?")
    for path in map(Path, paths):
        if path.is_file() and path.stat().st_size < _FEW and not path.read_bytes().strip():
            raise ValueError(f"{path}: it is empty, as what a run leaves that ended before it logged.")
    return saved_runs(paths, say=lambda sentence: print(sentence, file=sys.stderr))
