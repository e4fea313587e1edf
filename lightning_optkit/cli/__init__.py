# SPDX-License-Identifier: Apache-2.0
"""The `optkit` command."""

from lightning_optkit.cli.main import main

__all__ = ["main"]
