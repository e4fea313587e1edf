# SPDX-License-Identifier: Apache-2.0
"""The tables of a report: results, and the settings in which runs differ."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median, quantiles

from lightning_optkit.diagnostics._curve import Curve, tamed
from lightning_optkit.diagnostics._record import RunRecord

__all__ = [
    "OF_STEPS",
    "all_keys",
    "duration_of",
    "end_of",
    "goal_of",
    "number_text",
    "results",
    "settings_rows",
    "shared_plans",
]

Row = tuple[str, ...]
_SMALL = re.compile(r"loss|err|mae|mse|rmse|nll|ppl|perplexity|wer|cer|fid|distance", re.IGNORECASE)
_LARGE = re.compile(r"acc|auc|auroc|f1|score|precision|recall|iou|map|bleu|rouge|r2|psnr|ssim|dice", re.IGNORECASE)
_DATE = "date"  # differs between any two runs
OF_STEPS = "training step"  # the timing whose values are those of `step_ms`
_FEW_STEPS = 20  # of which a share says little
_SAME = 0.05  # times that are closer than this are called the same
# A clip that changes most steps on purpose, and what it is made for.
_BY_DESIGN = {"AutoClip(": "as it is meant to: its bound is a percentile of the norms so far"}


def all_keys(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    """All keys, in order of first appearance.

    Example:
        >>> all_keys([{"a": 1}, {"b": 1, "a": 2}])
        ['a', 'b']
    """
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def goal_of(name: str, runs: Sequence[RunRecord]) -> str | None:
    """Goal of a metric, "min" or "max": what a callback watches it for, else what its name suggests, else None.

    Example:
        >>> goal_of("val_acc", []), goal_of("val_loss", []), goal_of("spread", [])
        ('max', 'min', None)
    """
    told = next((run.goals[name] for run in runs if name in run.goals), None)
    if told is not None:
        return told
    return "min" if _SMALL.search(name) else "max" if _LARGE.search(name) else None


def results(runs: Sequence[RunRecord]) -> list[Row]:
    """The quantity, then one cell per run."""
    rows: list[Row] = [
        ("optimizer steps", *(f"{run.num_steps:,}" if run.num_steps else "" for run in runs)),
        ("duration", *(duration_of(run) for run in runs)),
        ("ended by", *(_end(run) for run in runs)),
        ("training loss, last 5 %", *(_end_of(run.loss) for run in runs)),
    ]
    for name in all_keys(run.metrics for run in runs):
        curves = [run.metrics.get(name) for run in runs]
        goal = goal_of(name, runs)
        for which in ("lowest", "highest") if goal is None else (("lowest",) if goal == "min" else ("highest",)):
            label = which if goal is None else "best"
            rows.append((f"{name}, {label}", *(_extreme(curve, which == "highest") for curve in curves)))
        rows.append((f"{name}, last", *(_last_of(curve) for curve in curves)))
    if all(not run.loss.steps for run in runs):  # manual steps that return no loss
        for name in all_keys(run.logged for run in runs):
            rows.append((f"{name}, last 5 %", *(_end_of(run.logged.get(name, Curve())) for run in runs)))
    rows += _norm_rows(runs)
    for name in all_keys(run.timings for run in runs):
        spreads = [_quartiles(run.step_ms) if name == OF_STEPS else None for run in runs]
        rows.append((f"{name}, median (ms)", *_timings([run.timings.get(name) for run in runs], spreads)))
    return [row for row in rows if any(row[1:])]


def duration_of(run: RunRecord) -> str:
    """Wall time of the training; "" if it is not recorded.

    Example:
        >>> duration_of(RunRecord("run", elapsed_s=Curve([1, 2], [1.0, 75.0])))
        '1 min 15 s'
    """
    seconds = run.elapsed_s.last
    if seconds is None:
        return ""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest:.0f} s" if minutes else f"{rest:.1f} s"


def _end(run: RunRecord) -> str:
    """What ended the run before its time, in a few words."""
    return " ".join(run.ended.get("by", "").split("\n")[0].partition(":")[0].split()) if run.ended else ""


def settings_rows(runs: Sequence[RunRecord]) -> tuple[list[Row], list[Row]]:
    """The settings and callbacks in which the runs differ, and those that all have.

    Example:
        >>> a, b = RunRecord("a", callbacks={"Fuse": ""}), RunRecord("b", settings={"seed": "1"})
        >>> settings_rows([a, b])
        ([('Fuse', 'yes', ''), ('seed', '', '1')], [])
    """
    rows: list[Row] = []
    for name in all_keys(run.callbacks for run in runs):
        rows.append((name, *(run.callbacks.get(name, "") or ("yes" if name in run.callbacks else "") for run in runs)))
    for name in all_keys(run.settings for run in runs):
        if name != _DATE:
            rows.append((name, *(run.settings.get(name, "") for run in runs)))
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return differing, [row[:2] for row in rows if row not in differing]


def shared_plans(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Each plan once, with the names of the runs that have it."""
    plans: dict[str, list[str]] = {}
    for run in runs:
        if run.explanation:
            plans.setdefault(run.explanation, []).append(run.name)
    return [(", ".join(names), plan) for plan, names in plans.items()]


def _end_of(curve: Curve) -> str:
    return "" if not curve.values else number_text(end_of(curve))


def end_of(curve: Curve) -> float:
    """Mean of the last 5 % of the values; NaN if one of them, or all, are not finite."""
    last = curve.values[-max(1, len(curve.values) // 20) :]
    return fmean(tamed(last)) if last and all(map(math.isfinite, last)) else math.nan


def number_text(value: float) -> str:
    """A number in a few characters, and a number that is none by its name.

    Example:
        >>> number_text(0.25), number_text(2e-7), number_text(float("nan"))
        ('0.2500', '2e-07', 'not finite')
    """
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"


def _last_of(curve: Curve | None) -> str:
    return number_text(curve.values[-1]) if curve is not None and curve.values else ""


def _extreme(curve: Curve | None, highest: bool) -> str:
    steps, values = curve.finite() if curve is not None else ([], [])
    if not values:
        return ""
    best = max(values) if highest else min(values)
    return f"{number_text(best)} at step {steps[values.index(best)]:,}"


def _norm_rows(runs: Sequence[RunRecord]) -> list[Row]:
    """Median norm and fraction of clipped steps, over the steps at which every run with norms has one."""
    rows: list[Row] = []
    names = all_keys([*(run.grad_norm for run in runs), *(run.grad_norm_clipped for run in runs)])
    for name in names:
        of = f" of {name}" if len(names) > 1 else ""
        before = [_by_step(run.grad_norm.get(name)) for run in runs]
        after = [_by_step(run.grad_norm_clipped.get(name)) for run in runs]
        known = [norms.keys() for norms in [*before, *after] if norms]
        shared = sorted(set(known[0]).intersection(*known[1:])) if known else []
        if not shared:
            continue
        over = f", {len(shared):,} common steps" if any(len(norms) > len(shared) for norms in known) else ""
        medians = (_median_of(old or new, shared) for old, new in zip(before, after, strict=True))
        rows.append((f"gradient norm{of}, median{over}", *medians))
        shares = [_clipped(old, new, shared, run.clip) for old, new, run in zip(before, after, runs, strict=True)]
        rows += [(f"steps clipped{of}{over}", *shares)] if any(shares) else []
    return rows


def _by_step(curve: Curve | None) -> dict[int, float]:
    return dict(zip(*curve.finite(), strict=True)) if curve is not None else {}


def _median_of(norms: Mapping[int, float], steps: Sequence[int]) -> str:
    return f"{median(norms[step] for step in steps):.3g}" if norms else ""


def _clipped(before: Mapping[int, float], after: Mapping[int, float], steps: Sequence[int], clip: str) -> str:
    if not before or not after:
        return ""
    share = sum(after[step] < before[step] * (1.0 - 1e-5) for step in steps) / len(steps)
    if not share and not clip:  # nothing clips
        return ""
    meant = next((why for kind, why in _BY_DESIGN.items() if clip.startswith(kind)), None)
    few = f" of {len(steps)} measured" if len(steps) < _FEW_STEPS else ""
    return f"{share:.0%}{few}" + (f", {meant}" if meant and share else "")


def _quartiles(curve: Curve) -> tuple[float, float] | None:
    values = curve.finite()[1]
    if len(values) < 2:
        return None
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def _timings(values: Sequence[float | None], spreads: Sequence[tuple[float, float] | None]) -> list[str]:
    """Medians with their ratio to the first, which is named where the middle halves of the steps do not overlap."""
    first, cells = values[0], list[str]()
    for value, spread in zip(values, spreads, strict=True):
        cell = "" if value is None else f"{value:.3g}"
        if cells and first and value:
            ratio = first / value
            of_first = spreads[0]
            if abs(ratio - 1) < _SAME:
                cell += " (the same)"
            elif spread and of_first and max(spread[0], of_first[0]) <= min(spread[1], of_first[1]):
                cell += " (the same within the spread of the steps)"
            else:
                cell += f" ({ratio:.2g}x faster)" if ratio > 1.0 else f" ({1.0 / ratio:.2g}x slower)"
        cells.append(cell)
    return cells
