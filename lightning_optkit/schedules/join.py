# SPDX-License-Identifier: Apache-2.0
"""Two schedules in sequence."""

from lightning_optkit.schedules.schedule import Length, Schedule, check_length, check_schedule, resolve_length

__all__ = ["join"]


def join(a: Schedule, at: Length, b: Schedule) -> Schedule:
    """Follows `a` until `at`, then `b`, each as if its part were the whole run.

    Both clocks start at 0 (as in torch's SequentialLR), and fractions inside `a` or `b` are fractions of its part.

    Args:
        a: The first schedule; it sees a run of `at` steps.
        at: Where `b` takes over: an int >= 1 (steps) or a float in (0, 1) (fraction of the run).
        b: The second schedule; it sees a run of the remaining steps.

    Raises:
        TypeError: if `a` or `b` is not a Schedule.
        ValueError: if `at` is out of range, or leaves no steps to `b`.

    Example:
        >>> from lightning_optkit.schedules import constant, linear
        >>> [join(constant(0.5), 0.5, linear())(t, 8) for t in range(9)]
        [0.5, 0.5, 0.5, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    check_schedule("join", "a", a)
    at = check_length("join", "at", at, whole_run=False)
    check_schedule("join", "b", b)
    return Schedule("join", _factor, (("a", a), ("at", at), ("b", b)))


def _factor(step: float, total_steps: float | None, *, a: Schedule, at: Length, b: Schedule) -> float:
    first = resolve_length("join", "at", at, total_steps, must_leave_rest=True)
    if step < first:
        return a(step, first)
    return b(step - first, None if total_steps is None else total_steps - first)
