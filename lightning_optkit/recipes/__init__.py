# SPDX-License-Identifier: Apache-2.0
"""Whole settings for a kind of run, each a commented file that LightningCLI reads as well."""

from lightning_optkit.recipes.recipe import recipe, recipe_names, recipe_text

__all__ = ["recipe", "recipe_names", "recipe_text"]
