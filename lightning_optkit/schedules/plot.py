# SPDX-License-Identifier: Apache-2.0
"""Plots schedules before training, with matplotlib only."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_optkit._checks import check_in, check_instance, check_like, check_listed, shown
from lightning_optkit.schedules.schedule import Schedule, check_schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot"]

_POINTS = 1_000


def plot(
    *schedules: Schedule, total_steps: float, labels: Sequence[str] | None = None, ax: "Axes | None" = None
) -> "Axes":
    """Plots the factor of each schedule over a run, and returns the axes.

    The curves end just before `total_steps`, which no step of the run reaches. Saves nothing and opens no window:
    `plot(cosine(), total_steps=100).figure.savefig("cosine.png")`.

    Args:
        schedules: One or more schedules.
        total_steps: Length of the run (in steps, or the unit of the schedules), in (0, inf).
        labels: One label per schedule, shown verbatim. Default: the calls that created them.
        ax: Axes to draw on. Default: those of a new figure.

    Raises:
        ValueError: if there is no schedule, the labels do not match, or a schedule does not fit into the run.

    Example:
        >>> from lightning_optkit.schedules import cosine, rex
        >>> len(plot(cosine(), rex(), total_steps=100).lines)
        2
    """
    if not schedules:
        raise ValueError("plot(schedules=()): schedules must hold at least one Schedule.")
    for schedule in schedules:
        check_schedule("plot", "schedules", schedule)
    check_in("plot", "total_steps", total_steps, "(0, inf)")
    if ax is not None:
        check_like("plot", "ax", ax, ("plot", "set_xlabel", "legend"), "the axes of a figure, such as plt.gca()")
    shown_as = [repr(schedule) for schedule in schedules] if labels is None else _checked(labels)
    if len(shown_as) != len(schedules):
        raise ValueError(f"plot(labels={shown(shown_as)}): labels must have one entry per schedule ({len(schedules)}).")

    steps = [total_steps * point / _POINTS for point in range(_POINTS)]
    curves = [[schedule(step, total_steps) for step in steps] for schedule in schedules]
    if ax is None:
        from matplotlib.figure import Figure  # not pyplot: no global state, and no GUI backend

        ax = Figure(layout="constrained").subplots()
    drawn = [ax.plot(steps, curve, label=label)[0] for curve, label in zip(curves, shown_as, strict=True)]
    ax.set_xlabel("step")
    ax.set_ylabel("factor")
    legend = ax.legend(drawn, [str(place) for place in range(len(drawn))])
    for text, label in zip(legend.get_texts(), shown_as, strict=True):
        text.set(parse_math=False, usetex=False, text=label)
    return ax


def _checked(labels: Sequence[str]) -> list[str]:
    listed = check_listed("plot", "labels", labels, 'a list of strings, such as ["cosine"]')
    for label in listed:
        check_instance("plot", "labels", label, str, 'a list of strings, such as ["cosine"]')
    return listed
