# SPDX-License-Identifier: Apache-2.0
"""`optkit info`."""

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["info"]


def info() -> None:
    """Shows what this installation can do: versions, compiled extension, instruction sets, threads, pages."""
    from lightning_optkit.diagnostics.environment import environment

    table = Table(box=box.SIMPLE, show_header=False, show_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in environment().items():
        table.add_row(name, fact)
    Console(markup=False, highlight=False).print(table)
