# SPDX-License-Identifier: Apache-2.0
"""`optkit completion`: what a shell needs to complete the commands and their options."""

from jsonargparse import ArgumentParser, Namespace

__all__ = ["add_options", "completion"]


def add_options(parser: ArgumentParser) -> None:
    """The shell needs no option before it."""
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="the shell")


def completion(options: Namespace) -> None:
    """Prints what a shell needs to complete the names of commands and options: bash, zsh, tcsh.

    `optkit completion bash > ~/.optkit.bash`, and `source ~/.optkit.bash` in `~/.bashrc`. Needs shtab. Of
    the options of fit, validate, test, predict, explain, find-lr and doctor it has those that are often given, such as
    --ckpt_path, and leaves out those of the Trainer.

    Raises:
        ValueError: without shtab.
    """
    try:
        import shtab
    except ImportError as error:
        raise ValueError("optkit completion needs shtab: pip install shtab.") from error
    from lightning_optkit.cli.main import parser_of_everything

    parser = parser_of_everything()
    parser.prog = "optkit"  # the word that a shell completes, also if `python -m lightning_optkit` asks
    print(shtab.complete(parser, shell=options.shell))
