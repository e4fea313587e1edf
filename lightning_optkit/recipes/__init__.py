# SPDX-License-Identifier: Apache-2.0
"""Whole settings for a kind of run, each a commented file that LightningCLI reads as well."""

from typing import TYPE_CHECKING

from lightning_optkit._near_names import refusing_names
from lightning_optkit.recipes.recipe import recipe, recipe_names, recipe_text

__all__ = ["recipe", "recipe_names", "recipe_text"]

if not TYPE_CHECKING:
    __getattr__ = refusing_names(__name__, __all__)
