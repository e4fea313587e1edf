# SPDX-License-Identifier: Apache-2.0
"""Line charts as SVG that takes its text color from the page, so that it is readable on light and dark."""

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_optkit.diagnostics._record import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Line", "chart", "color_of", "smoothed"]

_COLORS = ("#2f81d6", "#dd6b10", "#2a9d6f", "#b755c4", "#c9a20a", "#d64550")  # contrast >= 3:1 on white and on #14171c
_INK = "#123456"  # replaced by currentColor
_UNSEEN = re.compile(
    r"<metadata>.*?</metadata>"
    r'|\sxmlns(?::\w+)?="[^"]*"'  # HTML knows them
    r'|\sid="[\w.]+_\d+"'  # matplotlib's counters would repeat from chart to chart; the ids referred to are hashes
    r'|\s(?:width|height)="[\d.]+pt"',  # the page decides
    re.DOTALL,
)


@dataclass(frozen=True)
class Line:
    """One curve of a chart.

    Args:
        curve: What to draw; inf and NaN are left out.
        run: Index of its run: the color, and how thick, since equal curves must both be seen.
        label: In the legend; "" is not listed.
        style: "line", "faint" (behind, for raw values), "dots", or "rings" (not joined, for values with gaps).
    """

    curve: Curve
    run: int
    label: str
    style: str = "line"


def color_of(run: int) -> str:
    """The color of the run at an index, the same in every chart."""
    return _COLORS[run % len(_COLORS)]


def smoothed(curve: Curve) -> Curve:
    """Mean of the finite values around each one, over about a thirtieth of the curve: centered, so it does not lag.

    Example:
        >>> smoothed(Curve([1, 2], [3.0, 3.0])).values
        [3.0, 3.0]
    """
    steps, values = curve.finite()
    for _ in range(2):  # twice: a lone spike becomes a hill, not a box
        values = _means_around(values, reach=len(values) // 90)
    return Curve(steps, values)


def _means_around(values: list[float], reach: int) -> list[float]:
    sums = [0.0, *itertools.accumulate(values)]
    means = []
    for index in range(len(values)):
        side = min(reach, index, len(values) - 1 - index)  # shorter at both ends, never lopsided
        means.append((sums[index + side + 1] - sums[index - side]) / (2 * side + 1))
    return means


def chart(lines: Sequence[Line], *, ylabel: str, log: bool = False) -> str:
    """Draws `lines` over the optimizer step and returns an `<svg>` element that needs nothing outside itself.

    Args:
        lines: What to draw; those without a finite value are left out.
        ylabel: Title of the vertical axis, with its unit.
        log: Logarithmic vertical axis, if every value is positive.

    Example:
        >>> chart([Line(Curve([1, 2], [1.0, 0.5]), 0, "run")], ylabel="loss").startswith("<svg")
        True
    """
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": ylabel, "font.size": 10.0}):
        buffer = io.StringIO()
        _figure(lines, ylabel, log).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return _UNSEEN.sub("", svg[svg.index("<svg") :]).replace(_INK, "currentColor").strip()


def _figure(lines: Sequence[Line], ylabel: str, log: bool) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot: no global state, and no backend with a window

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    drawn = [(line, *line.curve.finite()) for line in lines]
    for line, steps, values in drawn:
        if steps:
            _draw(axes, line, steps, values)
    if log and all(min(values, default=1.0) > 0 for _, _, values in drawn):
        _use_log_scale(axes)
    _finish(axes, ylabel)
    return figure


def _draw(axes: "Axes", line: Line, steps: list[int], values: list[float]) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "line": {"linewidth": 2.8 if line.run == 0 else 1.4, "zorder": 3 + line.run},
        "faint": {"linewidth": 0.8, "alpha": 0.35, "zorder": 2},
        "dots": {"linewidth": 0.0, "marker": ".", "markersize": 3.5, "alpha": 0.7, "zorder": 2},
        "rings": {"linewidth": 0.0, "marker": "o", "markersize": 5.5, "markerfacecolor": "none", "zorder": 20},
    }
    looks = kinds[line.style]
    if line.style == "line" and len(steps) <= 30:
        looks = {**looks, "marker": "o", "markersize": 2.2 * looks["linewidth"]}
    axes.plot(steps, values, color=color_of(line.run), label=line.label or "_", **looks)


def _use_log_scale(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _finish(axes: "Axes", ylabel: str) -> None:
    axes.set_xlabel("optimizer step", color=_INK)
    axes.set_ylabel(ylabel, color=_INK)
    axes.tick_params(which="both", colors=_INK)
    axes.spines[:].set_edgecolor(_INK)
    axes.grid(color=_INK, alpha=0.12, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, frameon=False, fontsize=9, labelcolor=_INK)
