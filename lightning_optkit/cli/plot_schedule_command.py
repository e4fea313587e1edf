# SPDX-License-Identifier: Apache-2.0
"""`optkit plot-schedule`."""

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_optkit import schedules
from lightning_optkit._checks import check_in, check_int
from lightning_optkit._near_names import near_names
from lightning_optkit.diagnostics._files import why_unwritable
from lightning_optkit.schedules import Schedule, plot

__all__ = ["add_options", "plot_schedule", "with_paths"]

_ROWS = 11
_WIDTH = 40  # characters of a bar


def add_options(parser: ArgumentParser) -> None:
    """One subcommand per schedule, whose signature is its options."""
    kinds = parser.add_subcommands(title="schedules", dest="schedule")
    for name, make in _functions().items():
        text = inspect.getdoc(make) or ""
        options = type(parser)(description=text.partition("\n\nArgs:")[0].partition("\n\nRaises:")[0])
        options.add_function_arguments(make, as_group=False)
        options.add_argument("--total_steps", type=int, default=1000, help="length of the run, at least 1")
        options.add_argument("--base", type=float, default=1.0, help="the rate that the factor multiplies")
        options.add_argument("--output", type=Path, help="file to draw into, such as schedule.svg or schedule.png")
        kinds.add_subcommand(name, options, help=text.partition("\n")[0])


def _functions() -> dict[str, Callable[..., Schedule]]:
    """The schedules, by name."""
    made = {name: getattr(schedules, name) for name in sorted(schedules.__all__) if name != "plot"}
    return {name: make for name, make in made.items() if inspect.isfunction(make)}


def with_paths(words: Sequence[str]) -> list[str]:
    """The words with `--a cosine` as the path that the parser wants of a schedule within another.

    Args:
        words: The arguments of the program.

    Raises:
        ValueError: for a name that no schedule has.

    Example:
        >>> with_paths(["plot-schedule", "join", "--a", "cosine", "--b=linear"])[3:]
        ['lightning_optkit.schedules.cosine', '--b=lightning_optkit.schedules.linear']
    """
    functions, folder, given = _functions(), schedules.__name__, [*words]
    parameters = [each for make in functions.values() for each in inspect.signature(make).parameters.values()]
    places = {each.name for each in parameters if each.annotation is Schedule}
    for number, word in enumerate(words):
        option = re.fullmatch(r"--((?:\w+\.)*(\w+))(=.*)?", word)
        behind = number + 1 if option and option[3] is None else number
        if not option or option[2] not in places or behind == len(words):
            continue
        value = option[3][1:] if option[3] else words[behind]
        name = value.removeprefix(f"{folder}.")
        if name in functions:
            given[behind] = given[behind].removesuffix(value) + f"{folder}.{name}"
        elif name.isidentifier() or re.fullmatch(r"[-\d.e]+", value):
            near = near_names(name, functions)
            hint = f"Near it: {', '.join(near)}." if near else f"There are {', '.join(functions)}."
            raise ValueError(f"optkit plot-schedule: --{option[1]} {value}: there is no such schedule. {hint}")
    return given


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
