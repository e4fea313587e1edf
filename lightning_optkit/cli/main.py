# SPDX-License-Identifier: Apache-2.0
"""The `optkit` command: one function per subcommand; its signature is the options, its docstring the help."""

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["info", "main"]


def info() -> None:
    """Shows what this installation can do: versions, the compiled extension, instruction sets, threads, huge pages."""
    try:
        from lightning_optkit.diagnostics.environment import environment
    except ValueError as error:  # one of our environment variables has an invalid value
        sys.exit(str(error))

    table = Table(box=box.SIMPLE, show_header=False, show_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in environment().items():
        table.add_row(name, fact)
    Console(markup=False, highlight=False).print(table)


_COMMANDS: dict[str, Callable[..., None]] = {"info": info}


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        args: Command-line arguments after `optkit`. Default: those of the process.

    Raises:
        SystemExit: with 2 for unknown arguments, with 0 after `--help`.
    """
    parser = ArgumentParser(
        prog=_program(),
        description="Optimization and regularization strategies for Lightning, at the cost of one pass.",
    )
    subcommands = parser.add_subcommands(title="commands", description="`optkit COMMAND --help` says more of each.")
    for name, command in _COMMANDS.items():
        text = inspect.getdoc(command) or ""
        options = ArgumentParser(description=text)
        options.add_function_arguments(command)
        subcommands.add_subcommand(name, options, help=text.partition("\n")[0])
    if not (sys.argv[1:] if args is None else args):
        parser.print_help()
        return
    chosen = parser.parse_args(args)
    _COMMANDS[chosen.subcommand](**chosen[chosen.subcommand])


def _program() -> str:
    """How the user started it."""
    is_module = Path(sys.argv[0]).parts[-2:] == ("lightning_optkit", "__main__.py")
    return "python -m lightning_optkit" if is_module else "optkit"
