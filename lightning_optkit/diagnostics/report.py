# SPDX-License-Identifier: Apache-2.0
"""Compares training runs in one self-contained HTML file."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from lightning_optkit._checks import check_instance, check_listed, check_path, check_text, shown
from lightning_optkit.diagnostics._figures import Line, chart, color_of, smoothed
from lightning_optkit.diagnostics._record import Curve, RunRecord
from lightning_optkit.diagnostics.environment import environment

__all__ = ["Curve", "RunRecord", "result_rows", "write_report"]


def write_report(runs: Sequence[RunRecord], path: str | os.PathLike[str], *, title: str = "Training report") -> Path:
    """Writes a report that compares `runs`: results, plots, how each steps, and the environment.

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
    if target.is_dir():
        raise ValueError(f"write_report(path={shown(str(path))}): path must be a file, not a folder.")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("report.html.j2").render(
        title=title,
        names=[(run.name, color_of(index)) for index, run in enumerate(runs)],
        rows=result_rows(runs),
        charts=_charts(runs),
        plans=[(run.name, run.explanation) for run in runs if run.explanation],
        facts=environment(),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8", errors="replace")
    return target


def result_rows(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """The table of results: the quantity, then one cell per run.

    Gradient norms are taken at the steps at which all runs measured them. Timings of later runs include the ratio to
    the first run: "0.50 (4.0x faster)".

    Args:
        runs: One or more records with different names.

    Raises:
        ValueError: if there is no run, or two have the same name.

    Example:
        >>> result_rows([RunRecord("a", timings={"step": 2.0}), RunRecord("b", timings={"step": 0.5})])[-1]
        ('step, median (ms)', '2.00', '0.50 (4.0x faster)')
    """
    runs = _checked("result_rows", runs)
    rows: list[tuple[str, ...]] = [
        ("optimizer steps", *(f"{run.num_steps:,}" if run.num_steps else "" for run in runs)),
        ("training loss, last 5 %", *(_end_of(run.loss) for run in runs)),
    ]
    for name in _keys(run.metrics for run in runs):
        rows.append((f"{name}, last", *(_last_of(run.metrics.get(name)) for run in runs)))
    norms, shares = _gradient_norms(runs)
    rows += [("gradient norm, median", *norms), ("steps clipped", *shares)]
    for name in _keys(run.timings for run in runs):
        rows.append((f"{name}, median (ms)", *_timings([run.timings.get(name) for run in runs])))
    return [row for row in rows if any(row[1:])]


def _checked(owner: str, runs: Sequence[RunRecord]) -> list[RunRecord]:
    such_as = 'a list of records such as [RunRecord("plain")]'
    listed = check_listed(owner, "runs", runs, such_as, empty=True)
    for run in listed:
        check_instance(owner, "runs", run, RunRecord, such_as)
    names = [run.name for run in listed]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{owner}(runs={shown(names)}): runs must be one or more, each with a name of its own.")
    return listed


def _keys(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    """All keys, in order of first appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _end_of(curve: Curve) -> str:
    _, values = curve.finite()
    return f"{fmean(values[-max(1, len(values) // 20) :]):.4f}" if values else ""


def _last_of(curve: Curve | None) -> str:
    return f"{curve.values[-1]:.4f}" if curve is not None and curve.values else ""


def _gradient_norms(runs: Sequence[RunRecord]) -> tuple[list[str], list[str]]:
    """Median norm and fraction of clipped steps, over the steps at which every run with norms has one."""
    before = [dict(zip(*run.grad_norm.finite(), strict=True)) for run in runs]
    after = [dict(zip(*run.grad_norm_clipped.finite(), strict=True)) for run in runs]
    known = [norms.keys() for norms in [*before, *after] if norms]
    shared = sorted(set(known[0]).intersection(*known[1:])) if known else []
    if not shared:
        return ["" for _ in runs], ["" for _ in runs]
    medians = [f"{median(norms[step] for step in shared):.3g}" if norms else "" for norms in before]
    shares = []
    for old, new in zip(before, after, strict=True):
        clipped = sum(new[step] < old[step] * (1.0 - 1e-5) for step in shared) if old and new else 0
        shares.append(f"{100.0 * clipped / len(shared):.0f} %" if old and new else "")
    return medians, shares


def _timings(values: Sequence[float | None]) -> list[str]:
    first, cells = values[0], []
    for index, value in enumerate(values):
        cell = "" if value is None else f"{value:.2f}"
        if index > 0 and first and value:
            faster = first / value
            cell += f" ({faster:.1f}x faster)" if faster >= 1.0 else f" ({1.0 / faster:.1f}x slower)"
        cells.append(cell)
    return cells


def _charts(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """(caption, svg) of every recorded quantity."""
    drawn = [
        ("Training loss: raw behind, smoothed in front", _loss_lines(runs), "training loss", True),
        ("Learning rate that each step used", _rate_lines(runs), "learning rate", False),
        (
            "Gradient norm: before clipping (rings where measured now and then), and after it (dots)",
            _norm_lines(runs),
            "global L2 norm",
            True,
        ),
    ]
    for name in _keys(run.metrics for run in runs):
        lines = [Line(run.metrics[name], i, run.name) for i, run in enumerate(runs) if name in run.metrics]
        drawn.append((f"{name} at the end of each validation", lines, name, False))
    return [
        (caption, chart(lines, ylabel=ylabel, log=log))
        for caption, lines, ylabel, log in drawn
        if any(line.curve.finite()[0] for line in lines)
    ]


def _loss_lines(runs: Sequence[RunRecord]) -> list[Line]:
    raw = [Line(run.loss, i, "", "faint") for i, run in enumerate(runs)]
    return raw + [Line(smoothed(run.loss), i, run.name) for i, run in enumerate(runs)]


def _rate_lines(runs: Sequence[RunRecord]) -> list[Line]:
    lines = []
    for i, run in enumerate(runs):
        for group, curve in run.learning_rate.items():
            label = run.name if len(run.learning_rate) == 1 else f"{run.name}, {group}"
            lines.append(Line(curve, i, label))
    return lines


def _norm_lines(runs: Sequence[RunRecord]) -> list[Line]:
    lines = []
    for i, run in enumerate(runs):
        measured_now_and_then = len(run.grad_norm.steps) < len(run.loss.steps) / 2
        lines.append(Line(run.grad_norm, i, run.name, "rings" if measured_now_and_then else "line"))
        lines.append(Line(run.grad_norm_clipped, i, f"{run.name}, clipped", "dots"))
    return lines
