# SPDX-License-Identifier: Apache-2.0
"""One cycle: up to a large rate, down again, and far below the start at the end ("super-convergence").

Source: Smith and Topin 2018 (Super-Convergence), arXiv:1708.07120.
By default it has two cosine phases, as in torch and fastai; `shape="linear", three_phase=True` is the paper's policy.
"""

from itertools import pairwise

from lightning_optkit._checks import check_bools, check_in, check_one_of
from lightning_optkit.schedules._anneal import anneal
from lightning_optkit.schedules.schedule import Length, Schedule, check_length, require_total_steps, resolve_length

__all__ = ["one_cycle"]


def one_cycle(
    warmup: Length = 0.3,
    *,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    shape: str = "cosine",
    three_phase: bool = False,
    whole_steps: bool = True,
) -> Schedule:
    """Rises from 1 / div_factor to 1 over `warmup`, then falls to 1 / (div_factor * final_div_factor).

    torch's OneCycleLR, whose pct_start is `warmup`. For its momentum cycle, invert the schedule:
    `one_cycle(div_factor=0.85 / 0.95, final_div_factor=1.0)`, applied to a base momentum of 0.85.

    Args:
        warmup: Length of the rise: an int >= 1 (steps) or a float in (0, 1] (fraction of the run).
        div_factor: Ratio of the peak to the first factor, in (0, inf).
        final_div_factor: Ratio of the first to the last factor, in (0, inf).
        shape: "cosine" or "linear".
        three_phase: Return to the first factor as fast as it rose, and to the last one in a third phase.
        whole_steps: Put the end of each phase on its last step, one before the next phase, as torch does. False puts it
            on the boundary itself, as schedules in fractional epochs need.

    Raises:
        ValueError: if an argument is out of range, or the phases are longer than the run.

    Example:
        >>> schedule = one_cycle(warmup=0.5, div_factor=10.0, final_div_factor=10.0, shape="linear")
        >>> [round(schedule(t, 6), 3) for t in range(6)]
        [0.1, 0.55, 1.0, 0.67, 0.34, 0.01]
    """
    warmup = check_length("one_cycle", "warmup", warmup)
    div_factor = float(check_in("one_cycle", "div_factor", div_factor, "(0, inf)"))
    final_div_factor = float(check_in("one_cycle", "final_div_factor", final_div_factor, "(0, inf)"))
    check_one_of("one_cycle", "shape", shape, ("cosine", "linear"))
    check_bools("one_cycle", three_phase=three_phase, whole_steps=whole_steps)
    if div_factor * final_div_factor == 0:
        raise ValueError(f"one_cycle(final_div_factor={final_div_factor!r}): the last factor would be infinite.")
    if three_phase and isinstance(warmup, float):
        _check_half(warmup, warmup, 1.0)
    arguments = {
        "warmup": warmup,
        "div_factor": div_factor,
        "final_div_factor": final_div_factor,
        "shape": shape,
        "three_phase": three_phase,
        "whole_steps": whole_steps,
    }
    return Schedule("one_cycle", _factor, tuple(arguments.items()))


def _factor(
    step: float,
    total_steps: float | None,
    *,
    warmup: Length,
    div_factor: float,
    final_div_factor: float,
    shape: str,
    three_phase: bool,
    whole_steps: bool,
) -> float:
    run = require_total_steps("one_cycle", total_steps, "the cycle ends with the run")
    rise = resolve_length("one_cycle", "warmup", warmup, run)
    first, last = 1 / div_factor, 1 / (div_factor * final_div_factor)
    offset = 1 if whole_steps else 0
    knots = [(0.0, first), (rise - offset, 1.0)]
    if three_phase:
        _check_half(warmup, rise, run)
        knots.append((2 * rise - 2 * offset, first))
    knots.append((run - offset, last))

    for (start, start_factor), (end, end_factor) in pairwise(knots):
        if step <= end and start < end:
            return anneal(start_factor, end_factor, (step - start) / (end - start), shape)
    return last


def _check_half(warmup: Length, rise: float, run: float) -> None:
    if 2 * rise > run:
        raise ValueError(f"one_cycle(warmup={warmup!r}): warmup must be at most half of the run if three_phase=True.")
