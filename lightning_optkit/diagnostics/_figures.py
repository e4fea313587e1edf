# SPDX-License-Identifier: Apache-2.0
"""Line charts as SVG that inherit the text color of the page, so that they are readable on light and dark."""

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any
from unicodedata import category

from lightning_optkit.diagnostics._curve import Curve, tamed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["INK", "Line", "as_label", "chart", "color_of", "finish_axes", "smoothed", "svg_of", "with_title"]

_COLORS = ("#2f81d6", "#dd6b10", "#2a9d6f", "#b755c4", "#c9a20a", "#d64550")  # contrast >= 3:1 on white and on #14171c
INK = "#123456"  # replaced by currentColor
_VERBATIM = {"text.usetex": False, "text.parse_math": False}  # names are not math
_MAX_MARKS = 120  # more points than that hide each other
_SHORT = 24  # characters of a label that leaves room beside it
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
        color: Number of its color, that of its run if there are several. The first is drawn thick, behind the others,
            since equal curves must both be visible.
        label: Label in the legend; "" is not listed.
        style: "band" (shaded from the curve to `upper`), "line", "thin", "faint" (behind, for the values of each
            step), "dashes" (joined points: few values, such as one per validation), "dots" (not joined) or "rings" (not
            joined, in front).
        upper: The other side of a band, at the same steps.
    """

    curve: Curve
    color: int
    label: str
    style: str = "line"
    upper: Curve | None = None


def color_of(number: int) -> str:
    """The color of this number: that of the run at this place, the same in every chart."""
    return _COLORS[number % len(_COLORS)]


def smoothed(curve: Curve) -> Curve:
    """Centered moving average over about 1/30 of the curve, ignoring non-finite values; centered, so it does not lag.

    Example:
        >>> smoothed(Curve([1, 2], [3.0, 3.0])).values
        [3.0, 3.0]
    """
    steps, values = _drawable(curve)
    for _ in range(2):  # twice: a single spike becomes smooth, not a box
        values = _means_around(values, reach=len(values) // 90)
    return Curve(steps, values)


def _drawable(curve: Curve) -> tuple[list[int], list[float]]:
    steps, values = curve.finite()
    return steps, tamed(values)


def _means_around(values: list[float], reach: int) -> list[float]:
    sums = [0.0, *itertools.accumulate(values)]
    means = []
    for index in range(len(values)):
        side = min(reach, index, len(values) - 1 - index)  # symmetric, so shorter at both ends
        means.append((sums[index + side + 1] - sums[index - side]) / (2 * side + 1))
    return means


def chart(lines: Sequence[Line], *, ylabel: str, xlabel: str = "step", log: bool = False) -> str:
    """Draws `lines` over steps and returns a self-contained `<svg>` element.

    Args:
        lines: The curves; those without a finite value are left out.
        ylabel: Title of the vertical axis, with its unit.
        xlabel: Title of the horizontal axis.
        log: Logarithmic vertical axis, if every value is positive.

    Example:
        >>> chart([Line(Curve([1, 2], [1.0, 0.5]), 0, "run")], ylabel="loss").startswith("<svg")
        True
    """
    return svg_of(lambda figure: _draw_all(figure, lines, ylabel, xlabel, log), size=(5.0, 3.1), salt=as_label(ylabel))


def svg_of(draw: "Callable[[Figure], None]", *, size: tuple[float, float], salt: str) -> str:
    """A figure as a self-contained `<svg>` element, which takes its size, font and ink from the page around it.

    Args:
        draw: Draws into the figure.
        size: Width and height (inches of 72 units), for the proportions: 5 wide is readable on a telephone.
        salt: Text from which ids are made, so that the same figure gives the same file.
    """
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no global state, and no GUI backend

    settings = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 10.0, **_VERBATIM}
    with matplotlib.rc_context(settings), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", message=r"Glyph \d+.*missing from", category=UserWarning)  # the browser has
        # it
        buffer = io.StringIO()
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = _METADATA.sub("", buffer.getvalue())
    return _TAG.sub(_cleaned, svg[svg.index("<svg") :]).strip()


def with_title(svg: str, title: str) -> str:
    """A figure with a text for the pointer and for screen readers."""
    return svg.replace(">", f"><title>{escape(title, quote=False)}</title>", 1)


def _cleaned(tag: re.Match[str]) -> str:
    """Cleans one tag; the text between tags (names) is not changed."""
    return _UNSEEN.sub("", tag[0]).replace(INK, "currentColor")


def as_label(name: str, longest: int = _LONGEST) -> str:
    r"""A name as a single line, without unprintable characters, shortened.

    Example:
        >>> as_label("two\nlines, cost $x^$")
        'two lines, cost $x^$'
    """
    unseen = ("Cc", "Cs")  # control characters and surrogates
    seen = "".join("\N{REPLACEMENT CHARACTER}" if category(c) in unseen else c for c in " ".join(name.split()))
    return seen if len(seen) <= longest else f"{seen[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"


def _draw_all(figure: "Figure", lines: Sequence[Line], ylabel: str, xlabel: str, log: bool) -> None:
    axes = figure.subplots()
    drawn = [(line, *_drawable(line.curve)) for line in lines]
    named = []
    for line, steps, values in drawn:
        if steps:
            artist = _draw(axes, line, steps, values)
            named += [(line.label, artist)] if line.label else []
    every = [value for _, _, values in drawn for value in values]
    if log and min(every, default=1.0) > 0:
        _use_log_scale(axes)
    elif every and min(every) == max(every) != 0:  # by itself the axis would span a tenth, in labels of seven digits
        axes.set_ylim(*sorted((0.0, 2 * every[0])))
    finish_axes(axes, xlabel, ylabel)
    if len(named) > 1:
        _add_legend(figure, axes, named)


def _draw(axes: "Axes", line: Line, steps: list[int], values: list[float]) -> "Line2D":
    width = 2.6 if line.color == 0 else 1.5
    kinds: dict[str, dict[str, Any]] = {
        "line": {"linewidth": width, "zorder": 3 + line.color},
        "thin": {"linewidth": 1.0, "zorder": 3 + line.color},
        "band": {"linewidth": 0.0, "zorder": 1},
        "faint": {"linewidth": 0.8, "alpha": 0.3, "zorder": 2},
        "dashes": {"linewidth": 1.5, "linestyle": (0, (4, 2)), "marker": "o", "markersize": 4.5, "zorder": 10},
        "dots": {"linewidth": 0.0, "marker": "o", "markersize": 4.0, "markeredgewidth": 0.0, "alpha": 0.6, "zorder": 2},
        "rings": {"linewidth": 0.0, "marker": "o", "markersize": 5.5, "markerfacecolor": "none", "zorder": 20},
    }
    looks = kinds[line.style]
    if line.style == "line" and len(steps) <= 30:
        looks = {**looks, "marker": "o", "markersize": 3.0 + width}
    if line.style != "line" and len(steps) > _MAX_MARKS:
        every = -(-len(steps) // _MAX_MARKS)
        looks = looks if line.style in ("faint", "thin") else {**looks, "markevery": every}
    if line.upper is not None:
        axes.fill_between(steps, values, _drawable(line.upper)[1], color=color_of(line.color), alpha=0.2, linewidth=0.0)
    artist: Line2D = axes.plot(steps, values, color=color_of(line.color), **looks)[0]
    return artist


def _use_log_scale(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def finish_axes(axes: "Axes", xlabel: str, ylabel: str) -> None:
    """Titles, grid and ink."""
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(as_label(ylabel), color=INK)
    axes.tick_params(which="both", colors=INK)
    axes.spines[:].set_edgecolor(INK)
    axes.grid(color=INK, alpha=0.12, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _add_legend(figure: "Figure", axes: "Axes", named: "Sequence[tuple[str, Line2D]]") -> None:
    # matplotlib leaves out names that begin with an underscore.
    artists, places = [artist for _, artist in named], [str(place) for place in range(len(named))]
    looks: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": INK}
    if len(named) <= 2 and all(len(label) <= _SHORT for label, _ in named):
        legend = axes.legend(artists, places, **looks)
    else:  # inside, it would hide the curves
        columns = 1 if any(len(label) > _SHORT for label, _ in named) else 2
        legend = figure.legend(artists, places, loc="outside lower center", ncols=columns, **looks)
    for text, (label, _) in zip(legend.get_texts(), named, strict=True):
        text.set_text(as_label(label))
