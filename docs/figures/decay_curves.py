# SPDX-License-Identifier: Apache-2.0
"""Draws the decay curves of the textbook, and the schedules beyond them, into decay_curves.svg.

The left panel redraws the comparison of decay methods in Qiu Xipeng, Neural Networks and Deep Learning, section 7.2.3;
the small panels show warm-up, cycles and later schedules.
Usage: python docs/figures/decay_curves.py [--output FILE.svg or FILE.png]
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_optkit.schedules import (
    constant,
    cosine,
    exponential,
    inverse_time,
    natural_exponential,
    one_cycle,
    piecewise_constant,
    plot,
    rex,
    sgdr,
    triangular,
    warmup,
    warmup_stable_decay,
)

TOTAL_STEPS = 100

TEXTBOOK = {
    "piecewise constant": piecewise_constant([20, 40, 60, 80], [1.0, 0.6, 0.36, 0.216, 0.13]),
    "inverse time, β = 0.1": inverse_time(0.1),
    "exponential, β = 0.96": exponential(0.96),
    "natural exponential, β = 0.06": natural_exponential(0.06),
    "cosine": cosine(),
}
BEYOND = {
    "warm-up": warmup(constant(), 0.2),
    "triangular": triangular(step_size_up=0.125, min_factor=0.25),
    "SGDR": sgdr(cycle=1 / 7, cycle_mult=2.0),
    "one cycle": one_cycle(),
    "WSD": warmup_stable_decay(warmup=0.1, decay=0.25),
    "REX": rex(),
}
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))  # to be told apart in print


def draw_textbook(ax: Axes) -> None:
    """The five laws on one pair of axes, to be compared."""
    plot(*TEXTBOOK.values(), total_steps=TOTAL_STEPS, labels=list(TEXTBOOK), ax=ax)
    for line, style in zip(ax.lines, STYLES, strict=True):
        line.set(linestyle=style)
    ax.set(title="The five laws of the textbook", ylabel="share of the initial learning rate", ylim=(-0.03, 1.08))
    ax.legend()  # again, for the line styles
    ax.grid(alpha=0.3)


def draw_beyond(axes: Iterable[Axes]) -> None:
    """One schedule on each of `axes`, since six curves on one pair would hide each other."""
    for ax, (name, schedule) in zip(axes, BEYOND.items(), strict=True):
        plot(schedule, total_steps=TOTAL_STEPS, labels=[name], ax=ax)
        ax.legend().remove()  # its title names it
        ax.set(title=name, ylabel="share of the peak", ylim=(-0.06, 1.08))
        ax.label_outer()
        ax.grid(alpha=0.3)


def main(output: Path) -> None:
    """Writes the figure to `output`; twice the same input, twice the same bytes."""
    matplotlib.rcParams["svg.hashsalt"] = "decay_curves"
    figure = Figure(figsize=(12, 5), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(1, 1.25))
    draw_textbook(figure.add_subplot(grid[0]))
    draw_beyond(grid[1].subgridspec(2, 3).subplots().flat)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".svg"))
    main(parser.parse_args().output)
