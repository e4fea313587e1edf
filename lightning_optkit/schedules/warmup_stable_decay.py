# SPDX-License-Identifier: Apache-2.0
"""Warmup-stable-decay (WSD): a linear warmup, a long constant part, and a decay at the end of the run.

Source: Hu et al. 2024 (MiniCPM), arXiv:2404.06395, section 4; the 1-sqrt decay from Hagele et al. 2024,
arXiv:2405.18392.
"""

from lightning_optkit._checks import check_in, check_one_of
from lightning_optkit.schedules._anneal import anneal
from lightning_optkit.schedules.schedule import Length, Schedule, check_length, require_total_steps, resolve_length

__all__ = ["warmup_stable_decay"]


def warmup_stable_decay(
    warmup: Length = 0.05,
    decay: Length = 0.2,
    *,
    shape: str = "1-sqrt",
    min_factor: float = 0.0,
    start_factor: float = 0.01,
) -> Schedule:
    """Rises to 1 over `warmup`, stays there, and falls to `min_factor` over the last `decay` of the run.

    The part before the decay does not depend on the length of the run: to extend a run, resume a checkpoint from there.

    Args:
        warmup: Length of the rise: an int >= 0 (steps) or a float in (0, 1] (fraction of the run).
        decay: Length of the fall: an int >= 1 (steps) or a float in (0, 1] (fraction of the run).
        shape: Shape of the decay: "1-sqrt", "linear", "cosine", or "exponential" (needs `min_factor` > 0).
        min_factor: Factor at the end, in [0, 1].
        start_factor: Factor at step 0, in [0, 1]. Not 0 by default, since a first step at rate 0 is a step lost.

    Raises:
        ValueError: if an argument is out of range, or warmup and decay overlap.

    Example:
        >>> schedule = warmup_stable_decay(warmup=2, decay=4, start_factor=0.0)
        >>> [round(schedule(t, 8), 3) for t in range(9)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.293, 0.134, 0.0]
    """
    name = "warmup_stable_decay"
    warmup = check_length(name, "warmup", warmup, minimum=0)
    decay = check_length(name, "decay", decay)
    check_one_of(name, "shape", shape, ("1-sqrt", "linear", "cosine", "exponential"))
    min_factor = float(check_in(name, "min_factor", min_factor, "(0, 1]" if shape == "exponential" else "[0, 1]"))
    start_factor = float(check_in(name, "start_factor", start_factor, "[0, 1]"))
    if isinstance(warmup, float) and isinstance(decay, float):
        _check_fits(decay, warmup + decay, 1.0)
    arguments = {
        "warmup": warmup,
        "decay": decay,
        "shape": shape,
        "min_factor": min_factor,
        "start_factor": start_factor,
    }
    return Schedule(name, _factor, tuple(arguments.items()))


def _factor(
    step: float,
    total_steps: float | None,
    *,
    warmup: Length,
    decay: Length,
    shape: str,
    min_factor: float,
    start_factor: float,
) -> float:
    name = "warmup_stable_decay"
    run = require_total_steps(name, total_steps, "the decay is counted from the end of the run")
    warmup_steps = resolve_length(name, "warmup", warmup, run)
    decay_steps = resolve_length(name, "decay", decay, run)
    _check_fits(decay, warmup_steps + decay_steps, run)
    if step < warmup_steps:
        return anneal(start_factor, 1.0, step / warmup_steps, "linear")
    progress = (step - (run - decay_steps)) / decay_steps
    return anneal(1.0, min_factor, min(max(progress, 0.0), 1.0), shape)


def _check_fits(decay: Length, both: float, run: float) -> None:
    if both > run * (1 + 1e-12):
        raise ValueError(
            f"warmup_stable_decay(decay={decay!r}): warmup and decay must fit into the run without overlapping."
        )
