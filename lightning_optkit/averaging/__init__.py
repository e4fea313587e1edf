# SPDX-License-Identifier: Apache-2.0
"""Averages of the parameters over training."""

from lightning_optkit.averaging.ema import EMA

__all__ = ["EMA"]
