# SPDX-License-Identifier: Apache-2.0
"""The `optkit` command. The file of a command is imported when it is called, since most of them import Lightning."""

import inspect
import os
import re
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

import lightning_optkit
from lightning_optkit.cli.near_options import about_missing, about_option, about_type, with_near_options

__all__ = ["COMMANDS", "TRAINER_COMMANDS", "main", "parser_of_everything"]

# What a Trainer does with a configuration file; their options are those of LightningCLI.
TRAINER_COMMANDS = {
    "fit": "Trains what a configuration file describes, where the classes of this package need no prefix.",
    "validate": "Runs one evaluation over the validation data of a configuration.",
    "test": "Runs one evaluation over the test data of a configuration.",
    "predict": "Runs the model of a configuration over its prediction data.",
    "explain": "Shows the plan of a configuration without training: optimizers, their stages, rates over the run.",
    "find-lr": "Runs the learning-rate range test of a configuration, and says which rate to use.",
    "doctor": "Checks a configuration before a run: fits its first batch, says what is wrong; status 1 for a fault.",
}
# What a shell completes of them; the others, such as --trainer.max_epochs, take seconds to find.
_OFTEN_GIVEN = ("config", "ckpt_path", "seed_everything", "print_config")
_GIVEN_TO = {"doctor": ("max_steps", "max_seconds", "json"), "find-lr": ("suggestion",)}
# A function each: its signature is the options, or `add_options` beside it adds them; its docstring is the help.
COMMANDS = {
    "list": "Lists every strategy, or those with some words in their name or description.",
    "plot-schedule": "Shows a schedule as a table of factors, and draws it into a file.",
    "recipe": "Prints a whole setting for a kind of run, with the reason for each value; without a name, lists them.",
    "bench": "Times the one-pass step against torch on this machine: clip, AdamW, average; three sizes of network.",
    "compare": "Runs one task under several settings and seeds: mean and spread, in a table and on a page.",
    "report": "Puts runs that are over on one page, side by side, and prints their results.",
    "demo": "Trains a small network on real images, plain and fused, and writes a report with pictures.",
    "completion": "Prints what a shell needs to complete the names of commands and options: bash, zsh, tcsh.",
    "info": "Shows what this installation can do: versions, compiled extension, instruction sets, threads, pages.",
}
_EPILOG = """optkit fit --config config.yaml trains; optkit list average finds a strategy; optkit plot-schedule cosine
draws one. Exit status: 0 done, 1 it could not be done, as a sentence says, 2 the command line or the file is wrong,
130 ended by Ctrl-C."""


class _Parser(ArgumentParser):
    """Without jsonargparse's line above the commands, which a heading of ours names already; knows near names."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:  # it has a formatter in some versions
        return re.sub(r"\n +Available subcommands:\s+\(required\)(?=\n)", "", super().format_help(*args, **kwargs))

    of_commands: Mapping[str, "_Parser"] = MappingProxyType({})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program, or raises if it was built so."""
        for name, parser in self.of_commands.items():
            if said := about_missing(message, name, parser.format_help()):
                parser.error(said, ex)  # with the usage and the help of the command
        super().error(about_type(message) or with_near_options(message, self.format_help()), ex)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        args: Command-line arguments after `optkit`. Default: those of the process.

    Raises:
        SystemExit: with 2 for unknown arguments, with 1 and a sentence for what could not be done, with 130 after
            Ctrl-C, with 0 after `--help`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no bars and lines shows question marks
    try:
        _run([*(sys.argv[1:] if args is None else args)])
        sys.stdout.flush()  # here, where a reader that has gone away is no error
    except BrokenPipeError:  # `optkit list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        _end_by_ctrl_c()
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt) and end.code == 1:  # Lightning's Trainer makes that of it
            _end_by_ctrl_c()
        raise


def _end_by_ctrl_c() -> NoReturn:
    print(f"{_program()}: ended by Ctrl-C.", file=sys.stderr)
    sys.exit(130)  # as a shell has it


def _run(words: list[str]) -> None:
    chosen = words[0] if words else None
    if chosen in TRAINER_COMMANDS:
        from lightning_optkit.cli.trainer_commands import run

        run(chosen, words[1:], _program())
        return
    parser = _parser({chosen})
    if not words:
        parser.print_help()
        return
    command, own = str(chosen), ""
    try:
        if command in COMMANDS and hasattr(_module(command), "with_paths"):
            words = _module(command).with_paths(words)
        config = parser.parse_args(words)
        command, own = config.subcommand, config[config.subcommand].get("schedule") or ""
        values = parser.instantiate_classes(config)[command]
        if hasattr(_module(command), "add_options"):
            _function(command)(values)
        else:
            _function(command)(**values)
    except BrokenPipeError:
        raise
    except ValueError as error:
        said = about_option(command, str(error), (command.replace("-", "_"), own))
        if said is None:
            sys.exit(str(error))
        print(f"{_program()} {said}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a file that cannot be written
        said = str(error)
        sys.exit(said if said.startswith("optkit ") else f"optkit {command}: {said}")


def parser_of_everything() -> ArgumentParser:
    """The parser with the options of every command, of those of a Trainer with the ones that are often given."""
    return _parser({*COMMANDS}, {name: (*_OFTEN_GIVEN, *_GIVEN_TO.get(name, ())) for name in TRAINER_COMMANDS})


def _parser(chosen: Container[str | None], by_name: Mapping[str, Sequence[str]] | None = None) -> ArgumentParser:
    """The parser; of the commands only the chosen ones have their options, since their types are slow to import.

    Args:
        chosen: Names of commands.
        by_name: Options of others, by their names alone.
    """
    parser = _Parser(
        prog=_program(),
        usage=f"{_program()} COMMAND [options]",
        version=lightning_optkit.__version__,
        description="Optimization and regularization strategies for Lightning, at the cost of one pass.",
        epilog=_EPILOG,
    )
    subcommands = parser.add_subcommands(title="commands", description="`optkit COMMAND --help` says more of each.")
    of_commands: dict[str, _Parser] = {}
    for name, summary in {**TRAINER_COMMANDS, **COMMANDS}.items():
        options = of_commands[name] = _Parser(description=_help_of(_function(name)) if name in chosen else summary)
        subcommands.add_subcommand(name, options, help=summary)
        options.prog = f"{_program()} {name}"  # by default the usage of the whole program stands in front
        for option in (by_name or {}).get(name, ()):
            options.add_argument(f"--{option}")
        if name in chosen and hasattr(_module(name), "add_options"):
            _module(name).add_options(options)
        elif name in chosen:
            options.add_function_arguments(_function(name), as_group=False)
    parser.of_commands = of_commands
    return parser


def _module(command: str) -> ModuleType:
    return import_module(f"lightning_optkit.cli.{command.replace('-', '_')}_command")


def _function(command: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(_module(command), command.replace("-", "_"))
    return function


def _help_of(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n\nRaises:")[0].partition("\n\nArgs:")[0]


def _program() -> str:
    """How the user started it."""
    is_module = Path(sys.argv[0]).parts[-2:] == ("lightning_optkit", "__main__.py")
    return "python -m lightning_optkit" if is_module else "optkit"
