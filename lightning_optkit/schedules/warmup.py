# SPDX-License-Identifier: Apache-2.0
"""Warmup: a ramp before any schedule, so that the first steps are small.

Source: Goyal et al. 2017 (Accurate, Large Minibatch SGD), arXiv:1706.02677, section 2.2 (gradual warm-up); Qiu Xipeng,
Neural Networks and Deep Learning, section 7.2.3 (learning rate warm-up).
Unlike the sources, the ramp starts at `start_factor`, so that the first step is not lost (0 gives their t / T').
"""

from lightning_optkit._checks import check_in, check_one_of
from lightning_optkit.schedules._anneal import anneal
from lightning_optkit.schedules.schedule import Length, Schedule, check_length, check_schedule, resolve_length

__all__ = ["warmup"]


def warmup(schedule: Schedule, steps: Length, shape: str = "linear", *, start_factor: float = 0.01) -> Schedule:
    """Rises to the first factor of `schedule` over `steps`, then follows `schedule` over the rest of the run.

    The clock of `schedule` starts after the warmup, and its fractions are fractions of the remaining run. To keep its
    clock, multiply instead: `warmup(constant(), 500) * piecewise_constant(...)`.

    Args:
        schedule: The schedule after the warmup.
        steps: Length of the warmup: an int >= 0 (steps) or a float in (0, 1) (fraction of the run).
        shape: "linear" (equal differences) or "exponential" (equal ratios; needs `start_factor` > 0).
        start_factor: Fraction of the first factor at step 0, in [0, 1]. The default is not 0, since a step at rate 0 is
            lost.

    Raises:
        ValueError: if an argument is out of range, or the warmup leaves nothing of the run.

    Example:
        >>> from lightning_optkit.schedules import linear
        >>> [warmup(linear(), steps=4, start_factor=0.0)(t, 8) for t in range(9)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    check_schedule("warmup", "schedule", schedule)
    steps = check_length("warmup", "steps", steps, minimum=0, whole_run=False)
    check_one_of("warmup", "shape", shape, ("linear", "exponential"))
    allowed = "(0, 1]" if shape == "exponential" else "[0, 1]"
    start_factor = float(check_in("warmup", "start_factor", start_factor, allowed))
    arguments = (("schedule", schedule), ("steps", steps), ("shape", shape), ("start_factor", start_factor))
    return Schedule("warmup", _factor, arguments)


def _factor(
    step: float, total_steps: float | None, *, schedule: Schedule, steps: Length, shape: str, start_factor: float
) -> float:
    warmup_steps = resolve_length("warmup", "steps", steps, total_steps, must_leave_rest=True)
    rest = None if total_steps is None else total_steps - warmup_steps
    if step < warmup_steps:
        return anneal(start_factor, 1.0, step / warmup_steps, shape) * schedule(0, rest)
    return schedule(step - warmup_steps, rest)
