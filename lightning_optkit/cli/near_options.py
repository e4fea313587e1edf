# SPDX-License-Identifier: Apache-2.0
"""A wrong option, command, choice or value: the message with the names that are near it, or with the option."""

import re
from collections.abc import Container

from lightning_optkit._near_names import near_names
from lightning_optkit.cli.wrong_values import about_value

__all__ = ["about_missing", "about_option", "about_type", "with_near_options"]

_QUOTES = "'\""


def with_near_options(message: str, shown: str) -> str:
    """The message, with what was meant if that can be told.

    Args:
        message: What the parser would print.
        shown: The help of the parser, which has its options.

    Example:
        >>> with_near_options("unrecognized arguments: --ckpt_pth last.ckpt", "  --ckpt_path CKPT_PATH")
        'unrecognized arguments: --ckpt_pth last.ckpt. Near it: --ckpt_path.'
        >>> with_near_options("argument shell: invalid choice: 'bsh' (choose from 'bash', 'zsh')", "")
        "argument shell: invalid choice: 'bsh' (choose from 'bash', 'zsh'). Near it: bash."
    """
    dashes, near = "", []
    if found := re.match(r"unrecognized arguments: (?:[^-]\S* )*--([\w.-]+)", message):
        dashes, near = "--", near_names(found[1], re.findall(r"(?<![\w-])--([\w.-]*\w)", shown))
    elif found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)$", message):
        near = near_names(found[1], re.findall(r"[\w.-]+", found[2]))
    return f"{message}. Near it: {', '.join(dashes + name for name in near)}." if near else message


def about_option(command: str, sentence: str, owners: Container[str]) -> str | None:
    """What a command says of an argument that is out of range, in the words of the command line.

    Args:
        command: Its name.
        sentence: Of a check of the package, or of the command.
        owners: Names in front of the sentence whose arguments are options of the command itself.

    Returns:
        The sentence; None if it is of something else than an argument.

    Example:
        >>> about_option("bench", "bench(device='gpu'): device must be one of 'cpu', 'cuda'.", ["bench"])
        "bench: --device gpu: device must be one of 'cpu', 'cuda'."
        >>> about_option("plot-schedule", "cosine(min_factor=2.0): min_factor must be in [0, 1].", ["warmup"])
        'plot-schedule: cosine(min_factor=2.0): min_factor must be in [0, 1].'
    """
    if sentence.startswith(f"optkit {command}: --"):
        return sentence.removeprefix("optkit ")
    found = re.match(r"(\w+)\((\w+)=(.*?)\): (.*)", sentence, flags=re.S)
    if not found or found[1] == "environment":  # a variable of the shell is no part of the command line
        return None
    owner, argument, value, said = found.groups()
    return f"{command}: " + (f"--{argument} {value.strip(_QUOTES)}: {said}" if owner in owners else sentence)


def about_type(message: str) -> str | None:
    r"""What an option takes, where it is given something else; None for another message.

    Args:
        message: What the parser of the command would print.

    Example:
        >>> about_type('Parser key "threads":\n  Expected a <class \'int\'>. Got value: many')
        'argument --threads: many is no int.'
    """
    found = re.match(r'Parser key "([\w.]+)"(?: element \d+)?:\n', message)
    said = found and about_value(message[found.end() :])
    return f"argument --{found[1]}: {said}" if found and said else None


def about_missing(message: str, command: str, shown: str = "") -> str | None:
    """What a command lacks, in its own words: jsonargparse speaks of keys of the whole program.

    Args:
        message: What the parser of the program would print.
        command: The name of the command.
        shown: The help of the command, which has its options.

    Returns:
        The sentence; None if the message is not of the command.

    Example:
        >>> about_missing("the following arguments are required: compare.task", "compare", "--task TASK")
        'the following arguments are required: --task'
        >>> about_missing('expected "plot.kind" to be one of {a,b}, but it was not provided.', "plot")
        'the kind is missing; one of a, b'
    """
    if found := re.fullmatch(rf"the following arguments are required: ({re.escape(command)}\..*)", message):
        names = [each.split(".")[1:] for each in found[1].split(", ")]  # more of them within a subcommand
        given = [
            f"--{name[-1]}" if len(name) > 1 or re.search(rf"--{name[0]}(?![\w-])", shown) else name[0]
            for name in names
        ]
        return f"the following arguments are required: {', '.join(given)}"
    if found := re.match(rf'expected "{re.escape(command)}\.(\w+)" to be one of {{(.*)}}', message):
        return f"the {found[1]} is missing; one of {', '.join(re.split(', *', found[2]))}"
    return None
