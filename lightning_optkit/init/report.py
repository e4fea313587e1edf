# SPDX-License-Identifier: Apache-2.0
"""The result of an initialization, parameter by parameter, as rows and as a table."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_optkit._checks import check_instance, check_int, check_listed
from lightning_optkit.init._write import is_sharded

__all__ = ["InitRow", "check_rows", "render_rows", "render_table"]

Row = TypeVar("Row")


@dataclass(frozen=True)
class InitRow:
    """One parameter and its initialization.

    Args:
        module: Name of its module in the model; "" is the model itself.
        parameter: Its name in that module.
        scheme: What was done: "he, relu", "zeros", "tied to wte.weight", "left as it was: frozen".
        shape: Its (global) shape.
        std: Standard deviation of its elements afterwards.

    Example:
        >>> InitRow("head", "bias", "zeros", (10,), 0.0).scheme
        'zeros'
    """

    module: str
    parameter: str
    scheme: str
    shape: tuple[int, ...]
    std: float


def row(module: str, parameter: str, scheme: str, value: Tensor) -> InitRow:
    """The row of a parameter with the new `value`."""
    whole: Tensor = value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
    std = float(whole.detach().float().std(correction=0)) if value.numel() else 0.0
    return InitRow(module, parameter, scheme, tuple(value.shape), std)


def check_rows(owner: str, name: str, rows: Sequence[Row], kind: type[Row]) -> list[Row]:
    """Returns the rows as a list, if they have the type that the functions of this folder return.

    Raises:
        TypeError: if they are not.
    """
    such_as = f"a list of {kind.__name__}, as returned by lightning_optkit.init"
    listed = check_listed(owner, name, rows, such_as, empty=True)
    for place, row in enumerate(listed):
        check_instance(owner, f"{name}[{place}]", row, kind, f"a row of {such_as}")
    return listed


def render_rows(rows: Sequence[InitRow], *, width: int = 120) -> str:
    """Returns `rows` as a text table.

    Args:
        rows: The result of `initialize` or a model scheme.
        width: Characters per line, in [1, inf); tables need some 40.

    Raises:
        TypeError: if `rows` holds anything but rows.
        ValueError: if `width` is out of range.

    Example:
        >>> print(render_rows([InitRow("head", "bias", "zeros", (10,), 0.0)], width=60))
        module   parameter   scheme   shape   std
        ─────────────────────────────────────────
        head     bias        zeros    10      0
        <BLANKLINE>
    """
    rows = check_rows("render_rows", "rows", rows, InitRow)
    check_int("render_rows", "width", width, minimum=1)
    cells = [
        (r.module or "(model)", r.parameter, r.scheme, "x".join(map(str, r.shape)) or "()", f"{r.std:.3g}")
        for r in rows
    ]
    return render_table(("module", "parameter", "scheme", "shape", "std"), cells, width=width)


def render_table(header: Sequence[str], cells: Sequence[Sequence[str]], *, width: int) -> str:
    """Returns a table of plain text, without color, ending in a newline.

    Args:
        header: Titles of the columns.
        cells: One sequence per line, as long as `header`.
        width: Characters per line.

    Example:
        >>> render_table(["a"], [["1"]], width=40).split()
        ['a', '─', '1']
    """
    table = Table(*header, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for line in cells:
        table.add_row(*line)
    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"
