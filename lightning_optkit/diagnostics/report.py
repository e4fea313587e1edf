# SPDX-License-Identifier: Apache-2.0
"""Compares training runs in one self-contained HTML file."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lightning_optkit._checks import check_instance, check_listed, check_path, check_text, shown
from lightning_optkit.diagnostics._curve import Curve
from lightning_optkit.diagnostics._figures import color_of
from lightning_optkit.diagnostics._files import replace_text
from lightning_optkit.diagnostics._record import RunRecord
from lightning_optkit.diagnostics._report_charts import Drawn, charts_of, heat_maps_of
from lightning_optkit.diagnostics._report_tables import duration_of, results, settings_rows, shared_plans
from lightning_optkit.diagnostics.environment import environment

__all__ = ["Curve", "RunRecord", "result_rows", "write_page", "write_report"]

# Control characters, such as those of a colored message; a page must have none but tabs and line ends.
_UNSEEN = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(9), 11, 12, *range(14, 32), 127)}


def write_report(runs: Sequence[RunRecord], path: str | os.PathLike[str], *, title: str = "Training report") -> Path:
    """Writes a page that compares `runs`: what differs, findings, results, curves, layers, how each steps.

    Args:
        runs: One or more records with different names; ratios are relative to the first.
        path: The HTML file to write; missing folders are created.
        title: Heading of the page.

    Returns:
        The file written, as an absolute path.

    Raises:
        ValueError: if there is no run, or two have the same name.

    Example:
        >>> from tempfile import mkdtemp
        >>> run = RunRecord("plain", loss=Curve([1, 2], [2.0, 1.0]))
        >>> write_report([run], f"{mkdtemp()}/report.html").name
        'report.html'
    """
    runs = _checked("write_report", runs)
    check_text("write_report", "title", title, 'a headline, such as "Training report"')
    target = check_path("write_report", "path", path).absolute()
    return write_page(
        runs, target, title=title, rows=results(runs), charts=charts_of(runs), heat_maps=heat_maps_of(runs)
    )


def write_page(
    runs: Sequence[RunRecord],
    target: Path,
    *,
    title: str,
    rows: Sequence[tuple[str, ...]],
    charts: Sequence[Drawn],
    heat_maps: Sequence[tuple[str, str, list[Drawn]]] = (),
) -> Path:
    """Writes the page with this table of results and these figures; the rest is taken from the records."""
    if target.is_dir():
        raise ValueError(f"write_report(path={shown(str(target))}): path must be a file, not a folder.")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["breakable"] = _breakable
    differing, shared = settings_rows(runs)
    page = templates.get_template("report.html.j2").render(
        title=title,
        runs=[(run, color_of(index)) for index, run in enumerate(runs)],
        durations=[duration_of(run) for run in runs],
        differing=differing,
        shared=shared,
        rows=rows,
        charts=charts,
        heat_maps=heat_maps,
        plans=shared_plans(runs),
        environments=_environments(runs),
    )
    replace_text(target, page.translate(_UNSEEN), errors="replace")
    return target


def result_rows(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """The table of results: the quantity, then one cell per run.

    Gradient norms are taken at the steps at which all runs measured them. Timings of later runs include the ratio to
    the first run: "0.5 (4x faster)"; of training steps only where the middle halves of their times do not overlap. The
    best value of a metric is the lowest or the highest, as a callback of the run watches it or its name suggests; both
    are listed where neither is known.

    Args:
        runs: One or more records with different names.

    Raises:
        ValueError: if there is no run, or two have the same name.

    Example:
        >>> result_rows([RunRecord("a", timings={"step": 2.0}), RunRecord("b", timings={"step": 0.5})])[-1]
        ('step, median (ms)', '2', '0.5 (4x faster)')
    """
    return results(_checked("result_rows", runs))


def _checked(owner: str, runs: Sequence[RunRecord]) -> list[RunRecord]:
    such_as = 'a list of records such as [RunRecord("plain")]'
    listed = check_listed(owner, "runs", runs, such_as, empty=True)
    for run in listed:
        check_instance(owner, "runs", run, RunRecord, such_as)
    names = [run.name for run in listed]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{owner}(runs={shown(names)}): runs must be one or more, each with a name of its own.")
    return listed


def _breakable(cell: str) -> str:
    """The cell with places where a browser may break a long setting, before a part of it rather than within a word."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[(\[=,._/])(?=[^\W\d_]|['(\[])", cell))


def _environments(runs: Sequence[RunRecord]) -> list[tuple[str, dict[str, str]]]:
    """Each environment once, with the names of the runs in it; that of this process if none is recorded."""
    found: list[tuple[list[str], dict[str, str]]] = []
    for run in runs:
        facts = run.environment or environment()
        same = next((names for names, other in found if other == facts), None)
        if same is None:
            found.append(([run.name], facts))
        else:
            same.append(run.name)
    return [(", ".join(names), facts) for names, facts in found]
