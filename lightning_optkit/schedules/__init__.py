# SPDX-License-Identifier: Apache-2.0
"""Schedules: pure functions from a step to the factor that multiplies a base value (a learning rate, a momentum, ...).

The five laws of the textbook: `piecewise_constant`, `inverse_time`, `exponential`, `natural_exponential`, `cosine`.
Other decays: `linear`, `polynomial`, `inverse_sqrt`, `rex`, `warmup_stable_decay`, `warmup_cosine`, `one_cycle`.
Cycles: `triangular`, `sgdr`.
Composition: `constant`, `warmup(schedule, steps)`, `join(a, at, b)`, `a * b`. Plotting: `plot`.

Each returns a `Schedule`, called as `schedule(step, total_steps)`; the conventions are in `schedule.py`.
"""

from typing import TYPE_CHECKING

from lightning_optkit._near_names import refusing_names
from lightning_optkit.schedules.constant import constant
from lightning_optkit.schedules.cosine import cosine
from lightning_optkit.schedules.exponential import exponential
from lightning_optkit.schedules.inverse_sqrt import inverse_sqrt
from lightning_optkit.schedules.inverse_time import inverse_time
from lightning_optkit.schedules.join import join
from lightning_optkit.schedules.linear import linear
from lightning_optkit.schedules.natural_exponential import natural_exponential
from lightning_optkit.schedules.one_cycle import one_cycle
from lightning_optkit.schedules.piecewise_constant import piecewise_constant
from lightning_optkit.schedules.plot import plot
from lightning_optkit.schedules.polynomial import polynomial
from lightning_optkit.schedules.rex import rex
from lightning_optkit.schedules.schedule import Length, Schedule
from lightning_optkit.schedules.sgdr import sgdr
from lightning_optkit.schedules.triangular import triangular
from lightning_optkit.schedules.warmup import warmup
from lightning_optkit.schedules.warmup_cosine import warmup_cosine
from lightning_optkit.schedules.warmup_stable_decay import warmup_stable_decay

__all__ = [
    "Length",
    "Schedule",
    "constant",
    "cosine",
    "exponential",
    "inverse_sqrt",
    "inverse_time",
    "join",
    "linear",
    "natural_exponential",
    "one_cycle",
    "piecewise_constant",
    "plot",
    "polynomial",
    "rex",
    "sgdr",
    "triangular",
    "warmup",
    "warmup_cosine",
    "warmup_stable_decay",
]

if not TYPE_CHECKING:
    __getattr__ = refusing_names(__name__, __all__)
