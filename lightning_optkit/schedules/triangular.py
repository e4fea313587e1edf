# SPDX-License-Identifier: Apache-2.0
"""Triangular cycles (CLR): the factor moves up and down between two bounds.

Source: Smith 2017 (Cyclical Learning Rates for Training Neural Networks), arXiv:1506.01186, section 3.
"""

from lightning_optkit._checks import check_in, check_one_of
from lightning_optkit.schedules.schedule import Length, Schedule, check_length, resolve_length

__all__ = ["triangular"]


def triangular(
    step_size_up: Length = 0.125,
    step_size_down: Length | None = None,
    *,
    min_factor: float = 0.25,
    mode: str = "triangular",
    gamma: float = 1.0,
) -> Schedule:
    """Rises from `min_factor` to 1 over `step_size_up`, falls back over `step_size_down`, and starts again.

    Same as torch's CyclicLR, whose max_lr is our base value and whose base_lr is `min_factor` times it. The defaults
    make four cycles per run; the paper recommends to stop at the end of a cycle, with a lower bound of 1/3 or 1/4 of
    the upper.

    Args:
        step_size_up: Length of a rise: an int >= 1 (steps) or a float in (0, 1] (fraction of the run).
        step_size_down: Length of a fall, in the same units. Default: that of a rise.
        min_factor: Lower bound, in [0, 1].
        mode: "triangular", "triangular2" (each cycle half as high) or "exp_range" (height gamma^step).
        gamma: Ratio of heights one step apart, in (0, 1]; 1 unless `mode` is "exp_range".

    Raises:
        ValueError: if an argument is out of range, or a rise or a fall is longer than the run.

    Example:
        >>> schedule = triangular(step_size_up=2, min_factor=0.0, mode="triangular2")
        >>> [schedule(t) for t in range(9)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.25, 0.5, 0.25, 0.0]
    """
    step_size_up = check_length("triangular", "step_size_up", step_size_up)
    if step_size_down is not None:
        step_size_down = check_length("triangular", "step_size_down", step_size_down)
    min_factor = float(check_in("triangular", "min_factor", min_factor, "[0, 1]"))
    check_one_of("triangular", "mode", mode, ("triangular", "triangular2", "exp_range"))
    gamma = float(check_in("triangular", "gamma", gamma, "(0, 1]"))
    if gamma != 1 and mode != "exp_range":
        raise ValueError(f"triangular(gamma={gamma!r}): gamma must be 1.0 unless mode is 'exp_range'.")
    arguments = {
        "step_size_up": step_size_up,
        "step_size_down": step_size_down,
        "min_factor": min_factor,
        "mode": mode,
        "gamma": gamma,
    }
    return Schedule("triangular", _factor, tuple(arguments.items()))


def _factor(
    step: float,
    total_steps: float | None,
    *,
    step_size_up: Length,
    step_size_down: Length | None,
    min_factor: float,
    mode: str,
    gamma: float,
) -> float:
    up = resolve_length("triangular", "step_size_up", step_size_up, total_steps)
    down = up if step_size_down is None else resolve_length("triangular", "step_size_down", step_size_down, total_steps)
    cycle, position = divmod(step, up + down)
    height = position / up if position <= up else (up + down - position) / down
    if mode == "triangular2":
        height *= 0.5**cycle
    elif mode == "exp_range":
        height *= gamma**step
    return min_factor + (1 - min_factor) * height
