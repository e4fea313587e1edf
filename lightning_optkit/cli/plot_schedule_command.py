# SPDX-License-Identifier: Apache-2.0
"""`optkit plot-schedule`."""

import inspect
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_optkit import schedules
from lightning_optkit._checks import check_in, check_int
from lightning_optkit.diagnostics._files import why_unwritable
from lightning_optkit.schedules import Schedule, plot

__all__ = ["add_options", "plot_schedule"]

_ROWS = 11
_WIDTH = 40  # characters of a bar


def add_options(parser: ArgumentParser) -> None:
    """One subcommand per schedule, whose signature is its options."""
    kinds = parser.add_subcommands(title="schedules", dest="schedule")
    for name in sorted(schedules.__all__):
        make = getattr(schedules, name)
        if inspect.isfunction(make) and name != "plot":
            text = inspect.getdoc(make) or ""
            options = type(parser)(description=text.partition("\n\nArgs:")[0].partition("\n\nRaises:")[0])
            options.add_function_arguments(make, as_group=False)
            options.add_argument("--total_steps", type=int, default=1000, help="length of the run, at least 1")
            options.add_argument("--base", type=float, default=1.0, help="the rate that the factor multiplies")
            options.add_argument("--output", type=Path, help="file to draw into, such as schedule.svg or schedule.png")
            kinds.add_subcommand(name, options, help=text.partition("\n")[0])


def plot_schedule(config: Namespace) -> None:
    """Shows a schedule as a table of factors, and draws it into a file.

    Raises:
        ValueError: for an argument out of range, or a file of a kind that cannot be drawn.
    """
    arguments = dict(config[config.schedule])
    total_steps, base, output = (arguments.pop(name) for name in ("total_steps", "base", "output"))
    check_int("plot_schedule", "total_steps", total_steps, minimum=1)
    check_in("plot_schedule", "base", base, "(0, inf)")
    schedule: Schedule = getattr(schedules, config.schedule)(**arguments)
    figure = Figure(layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if output is not None and output.suffix.lower().removeprefix(".") not in kinds:
        raise ValueError(
            f"optkit plot-schedule: --output {output}: the name must end in one of .{', .'.join(sorted(kinds))}."
        )
    if output is not None and (reason := why_unwritable(output)):
        raise ValueError(f"optkit plot-schedule: --output {output}: {reason}.")
    steps = sorted({round((total_steps - 1) * row / (_ROWS - 1)) for row in range(_ROWS)})
    values = [base * schedule(step, total_steps) for step in steps]
    table = Table(box=box.SIMPLE_HEAD, title=repr(schedule), title_justify="left")
    table.add_column("step", justify="right")
    table.add_column("factor" if base == 1 else "rate", justify="right")
    table.add_column("")
    highest = max(max(values), 1e-300)
    for step, value in zip(steps, values, strict=True):
        table.add_row(f"{step:,}", f"{value:.4g}", "█" * round(_WIDTH * value / highest))
    if output is not None:  # before the table, which would hide why there is no file
        plot(schedule, total_steps=total_steps, ax=figure.subplots())
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)
    console = Console(highlight=False, markup=False)
    console.print(table)
    if output is not None:
        console.print(f"Drawn: {output}")
