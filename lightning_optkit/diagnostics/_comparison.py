# SPDX-License-Identifier: Apache-2.0
"""Compares settings, each run with several seeds: mean and spread, in a table and on a page."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from lightning_optkit.diagnostics._curve import Curve, tamed
from lightning_optkit.diagnostics._figures import Line, chart, smoothed
from lightning_optkit.diagnostics._record import RunRecord
from lightning_optkit.diagnostics._report_charts import Drawn, over_seconds
from lightning_optkit.diagnostics._report_tables import all_keys, end_of, goal_of
from lightning_optkit.diagnostics.report import write_page

__all__ = ["comparison_rows", "write_comparison"]

Groups = Mapping[str, Sequence[RunRecord]]
_POINTS = 200  # of a mean curve


def comparison_rows(groups: Groups) -> list[tuple[str, ...]]:
    """The quantity, then mean and standard deviation of each group of runs with different seeds.

    Example:
        >>> runs = [RunRecord("a", metrics={"val_acc": Curve([1], [value])}) for value in (0.8, 0.9)]
        >>> comparison_rows({"plain": runs})[-1]
        ('val_acc, last', '0.85 +- 0.071')
    """
    every = [run for runs in groups.values() for run in runs]
    rows: list[tuple[str, ...]] = [("runs", *(str(len(runs)) for runs in groups.values()))]
    if any(run.ended for run in every):
        rows.append(("ended early", *(str(sum(bool(run.ended) for run in runs)) for runs in groups.values())))

    def add(name: str, value: Callable[[RunRecord], float | None]) -> None:
        cells = [_spread([value(run) for run in runs]) for runs in groups.values()]
        if any(cells):
            rows.append((name, *cells))

    add("seconds", lambda run: run.elapsed_s.last)
    add("training loss, last 5 %", lambda run: end_of(run.loss) if run.loss.values else None)
    for metric in all_keys(run.metrics for run in every):
        goal = goal_of(metric, every)
        if goal is not None:
            best = min if goal == "min" else max
            add(f"{metric}, best", partial(_of, metric, best))
        add(f"{metric}, last", partial(_of, metric, _last))
    return rows


def write_comparison(groups: Groups, path: Path, *, title: str) -> Path:
    """Writes a page: what differs, mean and spread of the results, curves against steps and against seconds."""
    firsts = [replace(runs[0], name=name, settings=_shared(runs)) for name, runs in groups.items()]
    return write_page(firsts, path.absolute(), title=title, rows=comparison_rows(groups), charts=_charts(groups))


def _shared(runs: Sequence[RunRecord]) -> dict[str, str]:
    """The settings, with the values of all runs where they differ."""
    names = [name for name in all_keys(run.settings for run in runs) if name != "date"]
    values = {name: list(dict.fromkeys(run.settings.get(name, "") for run in runs)) for name in names}
    return {name: ", ".join(each) for name, each in values.items()}


def _last(values: list[float]) -> float:
    return values[-1]


def _of(metric: str, choose: Callable[[list[float]], float], run: RunRecord) -> float | None:
    curve = run.metrics.get(metric, Curve())
    values = curve.values if choose is _last else curve.finite()[1]
    return choose(values) if values else math.nan if curve.values else None


def _spread(values: Sequence[float | None]) -> str:
    known = tamed([value for value in values if value is not None and math.isfinite(value)])
    if not known:
        return "" if all(value is None for value in values) else "not finite"
    missing = "" if len(known) == len(values) else f", {len(values) - len(known)} without a number"
    deviation = f" +- {stdev(known):.2g}" if len(known) > 1 else ""
    return f"{fmean(known):.4g}{deviation}{missing}"


def _charts(groups: Mapping[str, Sequence[RunRecord]]) -> list[Drawn]:
    caption = "Line: mean over the seeds; shaded: from the smallest to the largest."
    every = [run for runs in groups.values() for run in runs]
    drawn = [
        _chart("Loss", f"Training loss, smoothed. {caption}", groups, _loss, "loss", log=True),
        _chart("Loss against time", caption, groups, _loss_by_time, "loss", log=True, x="seconds"),
    ]
    for name in all_keys(run.metrics for run in every):
        drawn.append(_chart(name, f"At each validation. {caption}", groups, partial(_metric, name), name))
    drawn.append(_chart("Learning rate", caption, groups, _rate, "learning rate"))
    return [each for each in drawn if each is not None]


def _loss(run: RunRecord) -> Curve:
    return smoothed(run.loss)


def _loss_by_time(run: RunRecord) -> Curve:
    return over_seconds(smoothed(run.loss), run.elapsed_s)


def _metric(name: str, run: RunRecord) -> Curve:
    return run.metrics.get(name, Curve())


def _rate(run: RunRecord) -> Curve:
    return next(iter(run.learning_rate.values()), Curve())


def _chart(
    title: str,
    caption: str,
    groups: Mapping[str, Sequence[RunRecord]],
    curve_of: Callable[[RunRecord], Curve],
    ylabel: str,
    log: bool = False,
    x: str = "step",
) -> Drawn | None:
    lines = []
    for place, (name, runs) in enumerate(groups.items()):
        curves = [curve for curve in map(curve_of, runs) if curve.finite()[0]]
        if curves:
            mean, low, high = _mean_and_range(curves)
            lines += [Line(low, place, "", "band", upper=high), Line(mean, place, name)]
    return Drawn(title, caption, chart(lines, ylabel=ylabel, xlabel=x, log=log)) if lines else None


def _mean_and_range(curves: Sequence[Curve]) -> tuple[Curve, Curve, Curve]:
    """Over the range that all curves have, at the steps of the first one if there are few."""
    known = [curve.finite() for curve in curves]
    start, end = max(steps[0] for steps, _ in known), min(steps[-1] for steps, _ in known)
    own = [step for step in known[0][0] if start <= step <= end]
    grid = np.array(own, dtype=float) if 0 < len(own) <= _POINTS else np.linspace(start, max(start, end), _POINTS)
    values = np.stack([np.interp(grid, steps, each) for steps, each in known])
    mean, low, high = (Curve(grid.tolist(), each.tolist()) for each in (values.mean(0), values.min(0), values.max(0)))
    return mean, low, high
