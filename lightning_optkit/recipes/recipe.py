# SPDX-License-Identifier: Apache-2.0
"""Reads the files of this folder."""

from importlib.resources import files
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from lightning_optkit._checks import check_one_of

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

__all__ = ["recipe", "recipe_names", "recipe_text"]

_ORDER = ("mlp", "cnn", "transformer", "finetune", "gan", "selfsupervised", "timeseries")


def recipe_names() -> tuple[str, ...]:
    """The names of the recipes.

    Example:
        >>> recipe_names()
        ('mlp', 'cnn', 'transformer', 'finetune', 'gan', 'selfsupervised', 'timeseries')
    """
    return _ORDER


def recipe_text(name: str) -> str:
    """The file of a recipe, with the reason for each value: a starting point for a file of one's own.

    Args:
        name: One of `recipe_names`.

    Raises:
        ValueError: for another name.

    Example:
        >>> print(recipe_text("transformer").splitlines()[0])
        # A transformer language model, trained from its initialization.
    """
    check_one_of("recipe_text", "name", name, _ORDER)
    return (files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")


def recipe(name: str) -> "list[Callback]":
    """New callbacks for a kind of run; no value depends on the length of the run.

    `optkit recipe NAME` prints the file, which says why each value is what it is, and which optimizer, rate and
    batch it expects of the module.

    Args:
        name: "mlp" (a table), "cnn" (images), "transformer" (a language model), "finetune", "gan",
            "selfsupervised" or "timeseries".

    Raises:
        ValueError: for another name.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[*recipe("transformer")], logger=False, enable_checkpointing=False)
        >>> [type(callback).__name__ for callback in recipe("transformer")][:2]
        ['Fuse', 'ParameterGroups']
    """
    check_one_of("recipe", "name", name, _ORDER)
    from lightning.pytorch.callbacks import Callback  # seconds, which `optkit recipe` need not take to print a file

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--trainer.callbacks", type=list[Callback])
    config = parser.parse_string(recipe_text(name))
    made: list[Callback] = parser.instantiate_classes(config).trainer.callbacks
    return made
