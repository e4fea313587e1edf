# SPDX-License-Identifier: Apache-2.0
"""`optkit report`."""

import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_optkit._terminal import width
from lightning_optkit.diagnostics._files import why_unwritable
from lightning_optkit.diagnostics._saved_runs import saved_runs
from lightning_optkit.diagnostics._summary import summary_text, table_text
from lightning_optkit.diagnostics.report import result_rows, write_report

__all__ = ["add_options", "report"]


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
        ValueError: for a file that holds no run.
        FileNotFoundError: if there is none.
    """
    if any(Path(path).is_file() and Path(path).resolve() == Path(options.output).resolve() for path in options.paths):
        raise ValueError(f"optkit report: --output {options.output}: it is one of the runs, and would be overwritten.")
    if not all(options.paths):
        raise ValueError("optkit report: one of the paths is empty; is a variable of the shell not set?")
    reason = why_unwritable(Path(options.output))
    if reason:
        raise ValueError(f"optkit report: --output {options.output}: {reason}.")
    runs = saved_runs(options.paths, say=lambda sentence: print(sentence, file=sys.stderr))
    output = write_report(runs, Path(options.output), title=options.title)
    if len(runs) == 1:
        print(summary_text(runs[0], width()))
    else:
        print(table_text(result_rows(runs), ["", *(run.name for run in runs)], width()))
    print(f"Report: {output}")
