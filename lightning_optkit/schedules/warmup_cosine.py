# SPDX-License-Identifier: Apache-2.0
"""Linear warmup, then cosine decay: the default of most training recipes today.

Source: Goyal et al. 2017, arXiv:1706.02677, section 2.2 (warm-up); Loshchilov and Hutter 2017, arXiv:1608.03983,
equation 5 (cosine).
"""

from lightning_optkit._checks import check_in
from lightning_optkit.schedules._anneal import anneal
from lightning_optkit.schedules.schedule import Length, Schedule, check_length, require_total_steps, resolve_length

__all__ = ["warmup_cosine"]


def warmup_cosine(warmup: Length = 0.05, min_factor: float = 0.0, *, start_factor: float = 0.01) -> Schedule:
    """Rises to 1 over `warmup`, then falls to `min_factor` along half a cosine over the rest of the run.

    The same factors as `warmup(cosine(min_factor), warmup, start_factor=start_factor)`.

    Args:
        warmup: Length of the rise: an int >= 0 (steps) or a float in (0, 1) (fraction of the run).
        min_factor: Factor at the end, in [0, 1].
        start_factor: Factor at step 0, in [0, 1]. Not 0 by default, since a first step at rate 0 is a step lost.

    Raises:
        ValueError: if an argument is out of range, or the warmup leaves nothing of the run.

    Example:
        >>> [round(warmup_cosine(warmup=0.2)(t, 10), 3) for t in range(11)]
        [0.01, 0.505, 1.0, 0.962, 0.854, 0.691, 0.5, 0.309, 0.146, 0.038, 0.0]
    """
    warmup = check_length("warmup_cosine", "warmup", warmup, minimum=0, whole_run=False)
    min_factor = float(check_in("warmup_cosine", "min_factor", min_factor, "[0, 1]"))
    start_factor = float(check_in("warmup_cosine", "start_factor", start_factor, "[0, 1]"))
    arguments = (("warmup", warmup), ("min_factor", min_factor), ("start_factor", start_factor))
    return Schedule("warmup_cosine", _factor, arguments)


def _factor(step: float, total_steps: float | None, *, warmup: Length, min_factor: float, start_factor: float) -> float:
    run = require_total_steps("warmup_cosine", total_steps, "the cosine ends with the run")
    warmup_steps = resolve_length("warmup_cosine", "warmup", warmup, run, must_leave_rest=True)
    if step < warmup_steps:
        return anneal(start_factor, 1.0, step / warmup_steps, "linear")
    progress = min((step - warmup_steps) / (run - warmup_steps), 1.0)
    return anneal(1.0, min_factor, progress, "cosine")
