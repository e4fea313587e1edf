# SPDX-License-Identifier: Apache-2.0
"""Averages of the parameters during training, and of trained networks."""

from typing import TYPE_CHECKING

from lightning_optkit._near_names import refusing_names
from lightning_optkit.averaging.average_checkpoints import average_checkpoints, load_weights
from lightning_optkit.averaging.ema import EMA
from lightning_optkit.averaging.ensemble_predict import EnsemblePrediction, ensemble_predict
from lightning_optkit.averaging.greedy_soup import GreedySoup, greedy_soup
from lightning_optkit.averaging.lawa import LAWA
from lightning_optkit.averaging.lookahead import lookahead_
from lightning_optkit.averaging.post_hoc_ema import (
    PowerSnapshot,
    post_hoc_coefficients,
    post_hoc_ema,
    stored_snapshots,
)
from lightning_optkit.averaging.power_ema import PowerEMA
from lightning_optkit.averaging.standalone import averages_of, protect_average, update_average_
from lightning_optkit.averaging.swa import SWA

__all__ = [
    "EMA",
    "LAWA",
    "SWA",
    "EnsemblePrediction",
    "GreedySoup",
    "PowerEMA",
    "PowerSnapshot",
    "average_checkpoints",
    "averages_of",
    "ensemble_predict",
    "greedy_soup",
    "load_weights",
    "lookahead_",
    "post_hoc_coefficients",
    "post_hoc_ema",
    "protect_average",
    "stored_snapshots",
    "update_average_",
]

if not TYPE_CHECKING:
    __getattr__ = refusing_names(__name__, __all__)
