# SPDX-License-Identifier: Apache-2.0
"""The charts of a report: what is drawn together, in which style, and what the reader is told about it."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_optkit.diagnostics._curve import Curve
from lightning_optkit.diagnostics._figures import Line, as_label, chart, smoothed, with_title
from lightning_optkit.diagnostics._heat_map import heat_map, range_of
from lightning_optkit.diagnostics._record import LAYER_QUANTITIES, RunRecord
from lightning_optkit.diagnostics._report_tables import all_keys

__all__ = ["Drawn", "charts_of", "heat_maps_of", "over_seconds"]

_SIDE = re.compile(r"^(train|training|tr|val|valid|validation|dev)[_/. -]+|[_/. -](step|epoch)$", re.IGNORECASE)
_IS_LOSS = re.compile(r"loss|error", re.IGNORECASE)
_RARELY = 0.5  # of the steps: values that are known for fewer are not joined by a line
_FAR = 20.0  # rates that are so many times apart need a logarithmic axis
_QUANTITIES = {
    "grad_norm": (
        "Gradients of each layer",
        "Norm of the gradient; the first layer is on top. A color that fades from the last layers to the first ones is "
        "a gradient that vanishes on its way.",
        "gradient norm",
    ),
    "update_ratio": (
        "Updates of each layer",
        "Norm of a step's update, divided by that of the weights. About 0.001 is usual with Adam: far below, a layer "
        "hardly learns; near 0.1, each step overwrites it.",
        "update / weight",
    ),
    "activation": (
        "Outputs of each layer",
        "Root mean square of what a layer returns. It should stay within a factor of ten or so from layer to layer.",
        "root mean square",
    ),
    "closed": (
        "Closed units",
        "Share of the units that were 0 for the whole batch (ReLU), or flat (tanh, sigmoid).",
        "share of units",
    ),
}


@dataclass(frozen=True)
class Drawn:
    """One figure: title, what it shows in a sentence, and the drawing."""

    title: str
    caption: str
    svg: str


def charts_of(runs: Sequence[RunRecord]) -> list[Drawn]:
    """All charts over steps for which something is recorded."""
    drawn: list[Drawn | None] = [_loss(runs), *_logged(runs), *_metrics(runs), _rates(runs), _norms(runs)]
    if len(runs) > 1:
        drawn.insert(1, _loss_by_time(runs))
    of = ", ".join(as_label(run.name) for run in runs)  # a chart of one run has no legend
    return [
        replace(each, svg=with_title(each.svg, f"{as_label(each.title)}: {of}")) for each in drawn if each is not None
    ]


def heat_maps_of(runs: Sequence[RunRecord]) -> list[tuple[str, str, list[Drawn]]]:
    """Title, caption and one figure per run, of each quantity; those of one quantity have the same scale."""
    found = []
    for quantity in LAYER_QUANTITIES:
        title, caption, label = _QUANTITIES[quantity]
        of_runs = [(run.name, run.layers[quantity]) for run in runs if run.layers.get(quantity)]
        is_share = quantity == "closed"
        bounds = (0.0, 1.0) if is_share else range_of([layers for _, layers in of_runs])
        if of_runs and bounds is not None:
            drawn = [
                Drawn(
                    *((name, "") if len(runs) > 1 else (title, caption)),
                    heat_map(layers, label=label, bounds=bounds, log=not is_share),
                )
                for name, layers in of_runs
            ]
            found.append((title, caption, drawn))
    return found


def stem(name: str) -> str:
    """The name of a quantity, without the side it is measured on.

    Example:
        >>> stem("train_acc"), stem("val/acc_epoch"), stem("d_loss")
        ('acc', 'acc', 'd_loss')
    """
    while (shorter := _SIDE.sub("", name)) != name and shorter:
        name = shorter
    return name


def _drawn(
    title: str, caption: str, lines: Sequence[Line], ylabel: str, log: bool = False, x: str = "step"
) -> Drawn | None:
    if not any(line.curve.finite()[0] for line in lines):
        return None
    return Drawn(title, caption, chart(lines, ylabel=ylabel, xlabel=x, log=log))


def _loss(runs: Sequence[RunRecord]) -> Drawn | None:
    lines, validated = _trained([run.loss for run in runs], runs), _validated(runs, "loss", named=False)
    if not any(run.loss.finite()[0] for run in runs):
        return None
    parts = ["Line: training, smoothed; pale: each step."]
    parts += ["Dashes with points: validation."] if validated else []
    return _drawn("Loss", " ".join(parts), [*lines, *validated], "loss", log=True)


def _loss_by_time(runs: Sequence[RunRecord]) -> Drawn | None:
    lines = [Line(over_seconds(smoothed(run.loss), run.elapsed_s), i, run.name) for i, run in enumerate(runs)]
    caption = "Training loss, smoothed, over the time since the training began, validation included."
    return _drawn("Loss against time", caption, lines, "loss", log=True, x="seconds")


def over_seconds(curve: Curve, elapsed: Curve) -> Curve:
    """The curve over the seconds at which its steps ended, without steps whose time is not known."""
    steps, seconds = elapsed.finite()
    at = [(bisect_right(steps, step) - 1, value) for step, value in zip(curve.steps, curve.values, strict=True)]
    known = [(seconds[place], value) for place, value in at if place >= 0]
    return Curve([second for second, _ in known], [value for _, value in known])  # type: ignore[misc]


def _logged(runs: Sequence[RunRecord]) -> list[Drawn | None]:
    """What the module logs in its training steps, apart from the loss and what a validation metric is drawn with."""
    validated = {stem(name) for run in runs for name in run.metrics}
    kept = []
    for name in all_keys(run.logged for run in runs):
        is_loss = stem(name) == "loss" and any(run.loss.steps for run in runs)
        is_same = any(run.logged[name].values == run.loss.values for run in runs if name in run.logged)
        if not is_loss and not is_same and stem(name) not in validated:
            kept.append(name)
    caption = "Logged by the module in its training steps. Line: smoothed; pale: each step."
    if len(runs) > 1:
        return [_drawn(n, caption, _trained([r.logged.get(n, Curve()) for r in runs], runs), n) for n in kept]
    losses = [name for name in kept if _IS_LOSS.search(name)]
    others = [[name] for name in kept if name not in losses]
    drawn = []
    for names in [losses, *others]:
        curves = [runs[0].logged[name] for name in names]
        lines = [Line(curve, i, "", "faint") for i, curve in enumerate(curves)]
        lines += [Line(smoothed(curve), i, name) for i, (name, curve) in enumerate(zip(names, curves, strict=True))]
        drawn.append(_drawn(", ".join(names), caption, lines, "loss" if len(names) > 1 else "".join(names)))
    return drawn


def _metrics(runs: Sequence[RunRecord]) -> list[Drawn | None]:
    drawn = []
    for kind in dict.fromkeys(stem(name) for name in all_keys(run.metrics for run in runs)):
        if kind == "loss" and any(run.loss.finite()[0] for run in runs):
            continue
        trained = [next((c for n, c in run.logged.items() if stem(n) == kind), Curve()) for run in runs]
        caption, is_trained = "At the end of each validation.", any(curve.steps for curve in trained)
        lines = _validated(runs, kind, named=not is_trained)
        if is_trained:
            lines = [*_trained(trained, runs), *lines]
            caption = "Line: training, smoothed; pale: each step. Dashes with points: validation."
        names = [name for name in all_keys(run.metrics for run in runs) if stem(name) == kind]
        drawn.append(_drawn(", ".join(names), caption, lines, kind))
    return drawn


def _trained(curves: Sequence[Curve], runs: Sequence[RunRecord]) -> list[Line]:
    """Values of each step, pale, and smoothed in front."""
    labels = [run.name for run in runs] if len(runs) > 1 else ["training"]
    raw = [Line(curve, i, "", "faint") for i, curve in enumerate(curves)]
    return raw + [Line(smoothed(curve), i, label) for i, (label, curve) in enumerate(zip(labels, curves, strict=True))]


def _validated(runs: Sequence[RunRecord], kind: str, named: bool) -> list[Line]:
    """The validation metrics of this kind. Of one run, each has a color; of several, they may be `named` by run."""
    lines = []
    names = [name for name in all_keys(run.metrics for run in runs) if stem(name) == kind]
    for i, run in enumerate(runs):
        for place, name in enumerate(names):
            if name in run.metrics:
                label, color = (run.name if named else "", i) if len(runs) > 1 else (name, place + 1)
                lines.append(Line(run.metrics[name], color, label, "dashes"))
    return lines


def _rates(runs: Sequence[RunRecord]) -> Drawn | None:
    """Of one run, each optimizer and group has a color; those with the same rate share one."""
    lines: list[Line] = []
    for i, run in enumerate(runs):
        alike: list[tuple[list[str], Curve]] = []
        for label, curve in run.learning_rate.items():
            same = next((labels for labels, other in alike if other == curve), None)
            if same is None:
                alike.append(([label], curve))
            else:
                same.append(label)
        for place, (labels, curve) in enumerate(alike):
            group = labels[0] if len(labels) == 1 else f"{labels[0]} to {labels[-1]}"
            named = group if len(runs) == 1 else run.name if len(alike) == 1 else f"{run.name}, {group}"
            lines.append(Line(curve, place if len(runs) == 1 else i, named if len(runs) > 1 or len(alike) > 1 else ""))
    highest = [max(line.curve.finite()[1], default=0.0) for line in lines]
    if min((each for each in highest if each > 0), default=1.0) * _FAR < max(highest, default=0.0):
        positive = [Line(_above_zero(line.curve), line.color, line.label, line.style) for line in lines]
        return _drawn("Learning rate", "What each step used.", positive, "learning rate", log=True)
    return _drawn("Learning rate", "What each step used.", lines, "learning rate")


def _above_zero(curve: Curve) -> Curve:
    kept = [(step, value) for step, value in zip(*curve.finite(), strict=True) if value > 0]
    return Curve([step for step, _ in kept], [value for _, value in kept])


def _norms(runs: Sequence[RunRecord]) -> Drawn | None:
    lines: list[Line] = []
    is_rare = is_clipped = False
    for i, run in enumerate(runs):
        names = all_keys([run.grad_norm, run.grad_norm_clipped])
        for place, name in enumerate(names):
            before, after = run.grad_norm.get(name, Curve()), run.grad_norm_clipped.get(name, Curve())
            color = i if len(runs) > 1 else place
            label = ", ".join([run.name] * (len(runs) > 1) + [name] * (len(names) > 1))
            measured = before if before.steps else after
            rare = len(measured.steps) < _RARELY * max(run.num_steps, len(run.loss.steps))
            lines.append(Line(measured, color, label or "before clipping", "rings" if rare else "thin"))
            is_rare |= rare
            if before.steps and after.steps and after.values != before.values:
                is_clipped = True
                lines.append(
                    Line(after, color + (len(runs) == len(names) == 1), "" if label else "after clipping", "dots")
                )
    parts = ["Of all parameters together."]
    parts += ["Circles: measured every few steps."] if is_rare else []
    parts += ["Points: after clipping."] if is_clipped else []
    return _drawn("Gradient norm", " ".join(parts), lines, "L2 norm", log=True)
