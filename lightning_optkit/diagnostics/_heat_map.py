# SPDX-License-Identifier: Apache-2.0
"""A quantity of every layer over the run, as colors."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from lightning_optkit.diagnostics._curve import Curve
from lightning_optkit.diagnostics._figures import INK, as_label, finish_axes, svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["heat_map", "range_of"]

_COLUMNS, _ROWS, _LEVELS = 48, 24, 12
_LONGEST = 24  # characters of the name of a layer


def range_of(layers: Sequence[Mapping[str, Curve]]) -> tuple[float, float] | None:
    """The smallest and largest positive value, at most six decades apart; None if there is none.

    Example:
        >>> range_of([{"a": Curve([1, 2], [1e-9, 1.0])}, {"b": Curve([1], [2.0])}])
        (2e-06, 2.0)
    """
    values = [v for each in layers for curve in each.values() for v in curve.finite()[1] if v > 0]
    return (max(min(values), max(values) * 1e-6), max(values)) if values else None


def heat_map(layers: Mapping[str, Curve], *, label: str, bounds: tuple[float, float], log: bool = True) -> str:
    """Draws one row per layer, the first one on top, and returns a self-contained `<svg>` element.

    Of more than 24 layers, neighbors share a row, which shows their geometric mean. Between two measurements, the color
    is that of the first.

    Args:
        layers: The values of each layer, over steps.
        label: Title of the scale.
        bounds: The values at the ends of the scale, the same for all runs; beyond them, the color is that of the end.
        log: Logarithmic scale.

    Example:
        >>> heat_map({"a": Curve([1, 2], [1.0, 0.5])}, label="norm", bounds=(0.1, 1.0)).startswith("<svg")
        True
    """
    share = -(-len(layers) // _ROWS)
    names = [*layers]
    groups = [names[at : at + share] for at in range(0, len(names), share)]
    end = max((curve.steps[-1] for curve in layers.values() if curve.steps), default=1)
    low, high = (math.log10(b) for b in bounds) if log else bounds
    high = max(high, low + (0.1 if log else 1e-9))
    cells = [_row([layers[name] for name in group], end, log) for group in groups]
    levels = [[_level(value, low, high) for value in row] for row in cells]

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        _fill(axes, levels, end / _COLUMNS)
        axes.set_xlim(0, end)
        axes.set_ylim(len(groups), 0)
        axes.set_yticks([row + 0.5 for row in range(len(groups))], [_name(group) for group in groups], fontsize=8.5)
        finish_axes(axes, "step", "")
        axes.grid(visible=False)
        axes.tick_params(axis="y", length=0)
        _add_scale(figure, axes, label, low, high, log)

    return svg_of(draw, size=(5.0, 1.0 + 0.21 * max(len(groups), 4)), salt=as_label(label))


def _name(names: Sequence[str]) -> str:
    def short(name: str, longest: int) -> str:
        label = as_label(name)
        return label if len(label) <= longest else f"\N{HORIZONTAL ELLIPSIS}{label[1 - longest :]}"

    if len(names) == 1:
        return short(names[0], _LONGEST)
    return f"{short(names[0], _LONGEST // 2)} \N{EN DASH} {short(names[-1], _LONGEST // 2)}"


def _row(curves: Sequence[Curve], end: int, log: bool) -> list[float]:
    """The value in each column; NaN before the first one."""
    sums: list[list[float]] = [[] for _ in range(_COLUMNS)]
    for curve in curves:
        for step, value in zip(*curve.finite(), strict=True):
            at = min(_COLUMNS - 1, int(step * _COLUMNS / end))
            sums[at].append((math.log10(value) if value > 0 else -math.inf) if log else value)
    row, last = [], math.nan
    for values in sums:
        last = fmean(values) if values else last
        row.append(last)
    return row


def _level(value: float, low: float, high: float) -> int | None:
    if math.isnan(value):
        return None
    return 0 if value <= low else min(_LEVELS - 1, int((value - low) / (high - low) * _LEVELS))


def _colors() -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](level / (_LEVELS - 1))) for level in range(_LEVELS)]


def _fill(axes: "Axes", levels: Sequence[Sequence[int | None]], width: float) -> None:
    """One path per color: neighbors of the same color are one rectangle."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    boxes: dict[int, list[tuple[float, float, float]]] = {}
    for row, of_row in enumerate(levels):
        start = 0
        for column in range(1, len(of_row) + 1):
            if column == len(of_row) or of_row[column] != of_row[start]:
                level = of_row[start]
                if level is not None:
                    boxes.setdefault(level, []).append((start * width, row, column * width))
                start = column
    colors = _colors()
    for level, found in sorted(boxes.items()):
        corners = [Path([(x, y), (right, y), (right, y + 1), (x, y + 1), (x, y)], closed=True) for x, y, right in found]
        axes.add_patch(
            PathPatch(
                Path.make_compound_path(*corners), facecolor=colors[level], edgecolor=colors[level], linewidth=0.4
            )
        )


def _add_scale(figure: "Figure", axes: "Axes", label: str, low: float, high: float, log: bool) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    edges = [low + (high - low) * level / _LEVELS for level in range(_LEVELS + 1)]
    colors = ScalarMappable(BoundaryNorm(edges, _LEVELS), ListedColormap(_colors()))
    shown = [low + (high - low) * part / 3 for part in range(4)]
    scale = figure.colorbar(colors, ax=axes, ticks=shown, pad=0.02, aspect=14)
    scale.ax.set_yticklabels(
        [f"{float(f'{10**each:.1g}'):g}" if log else f"{each:.0%}" for each in shown], fontsize=8.5
    )
    scale.minorticks_off()
    scale.set_label(label, color=INK, fontsize=9)
    scale.ax.tick_params(which="both", colors=INK, length=2)
    scale.outline.set_visible(False)
