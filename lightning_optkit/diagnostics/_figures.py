# SPDX-License-Identifier: Apache-2.0
"""Line charts as SVG that inherit the text color of the page, so that they are readable on light and dark."""

import io
import itertools
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unicodedata import category

from lightning_optkit.diagnostics._record import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["Line", "as_label", "chart", "color_of", "smoothed"]

_COLORS = ("#2f81d6", "#dd6b10", "#2a9d6f", "#b755c4", "#c9a20a", "#d64550")  # contrast >= 3:1 on white and on #14171c
_INK = "#123456"  # replaced by currentColor
_VERBATIM = {"text.usetex": False, "text.parse_math": False}  # names are not math
_LONGEST = 60  # maximum characters of a label
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
_UNSEEN = re.compile(
    r'\sxmlns(?::\w+)?="[^"]*"'  # implicit in HTML
    r'|\sid="[\w.]+_\d+"'  # matplotlib's counters repeat across charts; ids that are referred to are hashes
    r'|\s(?:width|height)="[\d.]+pt"',  # set by the page
    re.DOTALL,
)


@dataclass(frozen=True)
class Line:
    """One curve of a chart.

    Args:
        curve: The curve; inf and NaN are left out.
        run: Index of its run: sets the color and the thickness, since equal curves must both be visible.
        label: Label in the legend; "" is not listed.
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
    """Centered moving average over about 1/30 of the curve, ignoring non-finite values; centered, so it does not lag.

    Example:
        >>> smoothed(Curve([1, 2], [3.0, 3.0])).values
        [3.0, 3.0]
    """
    steps, values = curve.finite()
    for _ in range(2):  # twice: a single spike becomes smooth, not a box
        values = _means_around(values, reach=len(values) // 90)
    return Curve(steps, values)


def _means_around(values: list[float], reach: int) -> list[float]:
    sums = [0.0, *itertools.accumulate(values)]
    means = []
    for index in range(len(values)):
        side = min(reach, index, len(values) - 1 - index)  # symmetric, so shorter at both ends
        means.append((sums[index + side + 1] - sums[index - side]) / (2 * side + 1))
    return means


def chart(lines: Sequence[Line], *, ylabel: str, log: bool = False) -> str:
    """Draws `lines` over optimizer steps and returns a self-contained `<svg>` element.

    Args:
        lines: The curves; those without a finite value are left out.
        ylabel: Title of the vertical axis, with its unit.
        log: Logarithmic vertical axis, if every value is positive.

    Example:
        >>> chart([Line(Curve([1, 2], [1.0, 0.5]), 0, "run")], ylabel="loss").startswith("<svg")
        True
    """
    import matplotlib

    settings = {"svg.fonttype": "none", "svg.hashsalt": as_label(ylabel), "font.size": 10.0, **_VERBATIM}
    with matplotlib.rc_context(settings), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", message=r"Glyph \d+.*missing from", category=UserWarning)  # the browser has
        # it
        buffer = io.StringIO()
        _figure(lines, ylabel, log).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = _METADATA.sub("", buffer.getvalue())
    return _TAG.sub(_cleaned, svg[svg.index("<svg") :]).strip()


def _cleaned(tag: re.Match[str]) -> str:
    """Cleans one tag; the text between tags (names) is not changed."""
    return _UNSEEN.sub("", tag[0]).replace(_INK, "currentColor")


def as_label(name: str) -> str:
    r"""A name as a single line, without unprintable characters, shortened.

    Example:
        >>> as_label("two\nlines, cost $x^$")
        'two lines, cost $x^$'
    """
    unseen = ("Cc", "Cs")  # control characters and surrogates
    seen = "".join("\N{REPLACEMENT CHARACTER}" if category(c) in unseen else c for c in " ".join(name.split()))
    return seen if len(seen) <= _LONGEST else f"{seen[: _LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"


def _figure(lines: Sequence[Line], ylabel: str, log: bool) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot: no global state, and no GUI backend

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    drawn = [(line, *line.curve.finite()) for line in lines]
    named = []
    for line, steps, values in drawn:
        if steps:
            artist = _draw(axes, line, steps, values)
            named += [(line.label, artist)] if line.label else []
    if log and all(min(values, default=1.0) > 0 for _, _, values in drawn):
        _use_log_scale(axes)
    _finish(axes, ylabel, named)
    return figure


def _draw(axes: "Axes", line: Line, steps: list[int], values: list[float]) -> "Line2D":
    kinds: dict[str, dict[str, Any]] = {
        "line": {"linewidth": 2.8 if line.run == 0 else 1.4, "zorder": 3 + line.run},
        "faint": {"linewidth": 0.8, "alpha": 0.35, "zorder": 2},
        "dots": {"linewidth": 0.0, "marker": ".", "markersize": 3.5, "alpha": 0.7, "zorder": 2},
        "rings": {"linewidth": 0.0, "marker": "o", "markersize": 5.5, "markerfacecolor": "none", "zorder": 20},
    }
    looks = kinds[line.style]
    if line.style == "line" and len(steps) <= 30:
        looks = {**looks, "marker": "o", "markersize": 2.2 * looks["linewidth"]}
    artist: Line2D = axes.plot(steps, values, color=color_of(line.run), **looks)[0]
    return artist


def _use_log_scale(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _finish(axes: "Axes", ylabel: str, named: "Sequence[tuple[str, Line2D]]") -> None:
    axes.set_xlabel("optimizer step", color=_INK)
    axes.set_ylabel(as_label(ylabel), color=_INK)
    axes.tick_params(which="both", colors=_INK)
    axes.spines[:].set_edgecolor(_INK)
    axes.grid(color=_INK, alpha=0.12, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if named:
        # matplotlib leaves out names that begin with an underscore.
        artists, places = [artist for _, artist in named], [str(place) for place in range(len(named))]
        legend = axes.legend(artists, places, frameon=False, fontsize=9, labelcolor=_INK)
        for text, (label, _) in zip(legend.get_texts(), named, strict=True):
            text.set_text(as_label(label))
