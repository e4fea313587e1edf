# SPDX-License-Identifier: Apache-2.0
"""`optkit recipe`."""

from jsonargparse import ArgumentParser, Namespace
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_optkit.recipes import recipe_names, recipe_text

__all__ = ["add_options", "recipe"]


def add_options(parser: ArgumentParser) -> None:
    """The name stands by itself."""
    parser.add_argument("name", nargs="?", choices=[*recipe_names()], help="without one: lists them")


def recipe(options: Namespace) -> None:
    """Prints a whole setting for a kind of run, with the reason for each value; without a name, lists them.

    `optkit recipe transformer > recipe.yaml`, then `optkit fit --config recipe.yaml --config mine.yaml`, where
    mine.yaml has the model, data and trainer. In Python: `L.Trainer(callbacks=[*ok.recipe("transformer")])`.
    """
    if options.name is not None:
        print(recipe_text(options.name), end="")
        return
    table = Table(box=box.SIMPLE, show_header=False)
    for name in recipe_names():
        table.add_row(name, recipe_text(name).partition("\n")[0].removeprefix("# "))
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print("optkit recipe NAME > recipe.yaml; optkit fit --config recipe.yaml --config mine.yaml")
