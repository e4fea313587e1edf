# SPDX-License-Identifier: Apache-2.0
"""A run in a few lines of a terminal: results, curves as blocks, findings."""

import io
import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_optkit._terminal import fitted
from lightning_optkit.diagnostics._curve import Curve
from lightning_optkit.diagnostics._figures import as_label, smoothed
from lightning_optkit.diagnostics._record import RunRecord
from lightning_optkit.diagnostics._report_tables import duration_of, results

__all__ = ["summary_text", "table_text"]

_WIDTH = 80
_BLOCKS = "▁▂▃▄▅▆▇█"
_ROUNDING = 1e-9  # within which a smoothed curve is constant, as the mean of a constant is rounded
_LINES_OF_ERROR = 4
_SPACES = re.compile(r"(?<!\+-) +(?!\+-)")
_OF_EDGES, _BETWEEN = 2, 3  # columns of a table's lines


def summary_text(run: RunRecord, width: int = _WIDTH) -> str:
    """Lines of at most `width` columns but for verdicts, without color; a curve takes two fifths of them.

    Example:
        >>> loss = Curve(list(range(1, 65)), [64.0 / step for step in range(1, 65)])
        >>> print(summary_text(RunRecord("plain", num_steps=64, loss=loss)).splitlines()[0])
        plain: 64 steps
    """
    took = duration_of(run)
    lines = [
        f"{as_label(run.name)}: {run.num_steps:,} step{'s' * (run.num_steps != 1)}" + (f" in {took}" if took else "")
    ]
    lines += _end(run, width)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for label, curve in _curves(run):
        blocks = _blocks(curve, "loss" in label, 2 * width // 5)
        table.add_row(*(Text(cell) for cell in (as_label(label), blocks, _ends(curve))))
    lines += _rendered(table, width)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, cell in results([run]):
        if name not in ("optimizer steps", "duration", "ended by"):
            table.add_row(Text(as_label(name)), Text(cell))
    lines = [fitted(line, width) for line in lines + _rendered(table, width)]
    if run.verdicts is not None:  # in one line each, so that what is to be pasted has no break
        lines += [f"GradientHealth: {verdict}" for verdict in run.verdicts] or ["GradientHealth: nothing is wrong"]
    return "\n".join(lines)


def table_text(rows: Sequence[Sequence[str]], heads: Sequence[str], width: int = _WIDTH) -> str:
    """A table whose first row names the columns; where the `width` would break a word, a block of lines per row.

    Example:
        >>> print(table_text([("loss", "1.0")], ["", "plain"]).splitlines()[0].strip())
        plain
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    lines = [[*map(as_label, heads)], *map(list, rows)]
    widths = _widths(lines, width - _OF_EDGES - _BETWEEN * (len(heads) - 1))
    if widths is None:
        return "\n".join(fitted(line, width) for row in rows for line in _stacked(row, lines[0]))
    for head, columns in zip(lines[0], widths, strict=True):
        table.add_column(Text(head), width=columns)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return "\n".join(_rendered(table, width))


def _widths(rows: Sequence[Sequence[str]], total: int) -> list[int] | None:
    """Of the columns of a table, at most `total` together, so that no word is broken; None where that cannot be.

    A deviation stays beside its mean.
    """
    columns = [*zip(*rows, strict=True)]
    widths = [max(len(word) for cell in column for word in _SPACES.split(cell)) for column in columns]
    whole = [max(map(len, column)) for column in columns]

    def wants(at: int) -> tuple[int, int]:
        lines = sum(-(-len(cell) // max(widths[at], 1)) for cell in columns[at] if cell)
        return lines, whole[at] - widths[at]

    while sum(widths) < min(total, sum(whole)):  # to the one of the most lines, of those that are not on one line each
        widths[max((at for at in range(len(widths)) if widths[at] < whole[at]), key=wants)] += 1
    return widths if sum(widths) <= total else None


def _stacked(row: Sequence[str], heads: Sequence[str]) -> list[str]:
    cells = zip(heads[1:], row[1:], strict=True)
    return [row[0], *(f"  {head}: {cell}" for head, cell in cells if cell)]


def _rendered(table: Table, width: int = _WIDTH) -> list[str]:
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None, force_terminal=False).print(table)
    return [line.rstrip() for line in buffer.getvalue().splitlines() if line.strip()]


def _end(run: RunRecord, width: int) -> list[str]:
    if not run.ended:
        return []
    texts = [f"Ended {run.ended.get('when', 'early')}, by {run.ended.get('by', 'an exception')}"]
    texts += [f"at {run.ended['where']}"] if run.ended.get("where") else []
    looks: dict[str, Any] = {"max_lines": _LINES_OF_ERROR, "placeholder": " ...", "subsequent_indent": "  "}
    return [line for text in texts for line in textwrap.wrap(as_label(text, len(text)), width, **looks)]


def _curves(run: RunRecord) -> list[tuple[str, Curve]]:
    curves = [("loss", run.loss)] if run.loss.finite()[0] else [*run.logged.items()]
    curves += [*run.metrics.items()]
    rates = [*run.learning_rate.items()]
    curves += [("learning rate" if len(rates) == 1 else f"rate of {name}", curve) for name, curve in rates[:4]]
    return [(label, curve) for label, curve in curves if len(curve.finite()[0]) > 1]


def _blocks(curve: Curve, is_loss: bool, most: int) -> str:
    """The curve in blocks, evenly over the steps; of a loss that spans two decades, its logarithm."""
    _, values = smoothed(curve).finite()
    if is_loss and min(values) > 0 and max(values) > 100 * min(values):
        values = [math.log(value) for value in values]
    low, high = min(values), max(values)
    if high - low <= _ROUNDING * abs(high):
        values = [low] * len(values)
    columns = min(most, len(values))
    shown = [values[round(at * (len(values) - 1) / max(1, columns - 1))] for at in range(columns)]
    return "".join(_BLOCKS[round((value - low) / (high - low or 1.0) * (len(_BLOCKS) - 1))] for value in shown)


def _ends(curve: Curve) -> str:
    values = smoothed(curve).finite()[1]
    end = "" if math.isfinite(curve.values[-1]) else ", then not finite"
    first, last = f"{values[0]:.4g}", f"{values[-1]:.4g}"
    is_constant = max(values) - min(values) <= _ROUNDING * abs(max(values))
    return f"{first}, constant{end}" if is_constant else f"{first} to {last}{end}"
