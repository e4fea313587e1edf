# SPDX-License-Identifier: Apache-2.0
"""A straight line between two factors: linear decay, or a ramp.

Source: Defazio et al. 2023 (When, Why and How Much?), arXiv:2310.07831, on linear decay to zero.
"""

from lightning_optkit._checks import check_in
from lightning_optkit.schedules._anneal import anneal
from lightning_optkit.schedules.schedule import Length, Schedule, check_length, resolve_length

__all__ = ["linear"]


def linear(start_factor: float = 1.0, end_factor: float = 0.0, steps: Length = 1.0) -> Schedule:
    """Goes from `start_factor` to `end_factor` in a straight line, then stays.

    Same as torch's LinearLR with total_iters = `steps`, but by default from 1 to 0 over the run.

    Args:
        start_factor: Factor at step 0, in [0, 1].
        end_factor: Factor at the end, in [0, 1].
        steps: Length of the line: an int >= 1 (steps) or a float in (0, 1] (fraction of the run).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> [linear()(t, 4) for t in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    start_factor = float(check_in("linear", "start_factor", start_factor, "[0, 1]"))
    end_factor = float(check_in("linear", "end_factor", end_factor, "[0, 1]"))
    steps = check_length("linear", "steps", steps)
    arguments = (("start_factor", start_factor), ("end_factor", end_factor), ("steps", steps))
    return Schedule("linear", _factor, arguments)


def _factor(step: float, total_steps: float | None, *, start_factor: float, end_factor: float, steps: Length) -> float:
    progress = min(step / resolve_length("linear", "steps", steps, total_steps), 1.0)
    return anneal(start_factor, end_factor, progress, "linear")
