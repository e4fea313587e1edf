# SPDX-License-Identifier: Apache-2.0
"""How often spike rules are wrong on healthy training steps, and which bad batches they find.

Runs of small networks on scikit-learn's data and Python's own library as text. Every 25 steps from step 100 on, bad
batches are tried and not stepped on: inputs times 100, noise in place of inputs, random labels. A bad batch "hurts" if
one step on it gives back more than 2 % of the progress so far, on a fixed batch and apart from BatchNorm's running
statistics, beyond what the same step gives back without gradients: momentum goes on by itself. `caught_with_drift`
counts this too, so that a batch without any gradient may be one to be caught. Families whose name starts with "held
out" were not looked at when the rule of `SpikeDetector` was chosen. `false` counts every verdict about a step of the
run itself; `false_that_hurt` are those of `SpikeDetector` about steps that hurt by the same measure, as those on
outliers of the data.

The other rules are those of their sources, read as: OLMo, loss or norm beyond 6 standard deviations of the last 128;
llm-foundry, loss beyond twice the mean of the last 100; ZClip, norm beyond 2.5 of an exponential mean's deviations.

Usage: python benchmarks/spike_detection.py [--steps 1500] [--seeds 3] [--first-seed 0] [--families NAME ...]
    [--without NAME ...] [--rules NAME ...] [--save]
"""

import argparse
import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from harness import environment, progress, results_file
from rich.console import Console
from rich.table import Table
from spike_families import FAMILIES, HURTS, Run

from lightning_optkit.diagnostics import SpikeDetector


class Rule(Protocol):
    """Judges a step, and is told of each one that was taken."""

    def judge(self, loss: float, norm: float) -> str:
        """The answer "spike", or another one."""

    def accept(self, loss: float, norm: float) -> None:
        """Remembers it."""


class Window:
    """`judge` by the last `length` losses and norms, once there are `least`."""

    def __init__(self, length: int, least: int, is_spike: Callable[[list[float], list[float], float, float], bool]):
        self.length, self.least, self.is_spike = length, least, is_spike
        self.losses: list[float] = []
        self.norms: list[float] = []

    def judge(self, loss: float, norm: float) -> str:
        """Either "spike" or "fine"."""
        if len(self.losses) < self.least:
            return "fine"
        return "spike" if self.is_spike(self.losses, self.norms, loss, norm) else "fine"

    def accept(self, loss: float, norm: float) -> None:
        """Remembers it."""
        self.losses = [*self.losses, loss][-self.length :]
        self.norms = [*self.norms, norm][-self.length :]


def six_sigma(losses: list[float], norms: list[float], loss: float, norm: float) -> bool:
    return any(
        value > statistics.fmean(seen) + 6 * statistics.pstdev(seen) for seen, value in ((losses, loss), (norms, norm))
    )


class ZScore:
    """ZClip's: exponential mean and variance of the norm, from those of the first 25."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def judge(self, loss: float, norm: float) -> str:
        """Either "spike" or "fine"."""
        far = len(self.first) == 25 and norm > self.mean + 2.5 * max(math.sqrt(self.variance), 1e-6)
        return "spike" if far else "fine"

    def accept(self, loss: float, norm: float) -> None:
        """Remembers it."""
        if len(self.first) < 25:
            self.first.append(norm)
            self.mean, self.variance = statistics.fmean(self.first), statistics.pvariance(self.first)
            return
        deviation = max(math.sqrt(self.variance), 1e-6)
        z = (norm - self.mean) / deviation
        kept = self.mean + 2.5**2 / z * deviation if z > 2.5 else norm
        self.mean += 0.03 * (kept - self.mean)
        self.variance = 0.97 * self.variance + 0.03 * (kept - self.mean) ** 2


RULES: dict[str, Callable[[], Rule]] = {
    "SpikeDetector": SpikeDetector,
    "OLMo": lambda: Window(128, 64, six_sigma),
    "llm-foundry": lambda: Window(100, 100, lambda losses, norms, loss, norm: loss > 2 * statistics.fmean(losses)),
    "ZClip": ZScore,
}


def wilson(count: int, total: int) -> tuple[float, float]:
    """95 % interval of a share."""
    if not total:
        return 0.0, 1.0
    z, share = 1.96, count / total
    center, half = share + z * z / 2 / total, z * math.sqrt(share * (1 - share) / total + (z / total) ** 2 / 4)
    scale = 1 + z * z / total
    return max((center - half) / scale, 0.0), min((center + half) / scale, 1.0)


class Tally:
    """What a rule did on a set of runs."""

    def __init__(self) -> None:
        self.steps = self.broken = self.hurt = 0
        self.false: Counter[str] = Counter()  # by family
        self.bad: dict[tuple[str, bool], list[bool]] = defaultdict(list)
        self.with_drift: list[bool] = []

    def row(self, families: str, rule: str) -> dict[str, Any]:
        """The numbers of a table, and more."""
        hurting = [hit for (_, hurts), hits in self.bad.items() if hurts for hit in hits]
        low, high = wilson(sum(hurting), len(hurting))
        false = self.false.total()
        false_low, false_high = wilson(false, self.steps)
        kinds = {kind: f"{sum(hits)}/{len(hits)}" for (kind, hurts), hits in sorted(self.bad.items()) if hurts}
        every = [hit for hits in self.bad.values() for hit in hits]
        return {
            "benchmark": "spike_detection", "families": families, "rule": rule, "healthy_steps": self.steps,
            "false": false, "false_in": dict(self.false), "false_that_hurt": self.hurt,
            "false_per_10k": 1e4 * false / self.steps, "false_interval": [1e4 * false_low, 1e4 * false_high],
            "hurting": len(hurting), "caught": sum(hurting) / max(len(hurting), 1), "caught_interval": [low, high],
            **kinds, "caught_with_drift": f"{sum(self.with_drift)}/{len(self.with_drift)}",
            "caught_of_all": sum(every) / max(len(every), 1), "taken_for_broken": self.broken,
        }  # fmt: skip


def follow(family: str, run: Run, rules: dict[str, Rule], tallies: dict[str, Tally]) -> None:
    """One training, judged by all rules."""
    for step in run:
        for name, rule in rules.items():
            tally = tallies[name]
            for bad in step.bad:
                lost = not (math.isfinite(bad.loss) and math.isfinite(bad.norm))
                is_found = lost or rule.judge(bad.loss, bad.norm) != "fine"
                tally.bad[bad.kind, bad.hurts].append(is_found)
                if not bad.lost <= HURTS:
                    tally.with_drift.append(is_found)
            verdict = rule.judge(step.loss, step.norm)
            tally.steps += 1
            tally.broken += verdict == "broken"
            if verdict != "fine":
                tally.false[family] += 1
                tally.hurt += isinstance(rule, SpikeDetector) and run.hurts()
            if verdict == "broken" and isinstance(rule, SpikeDetector):
                rule.restart()
            rule.accept(step.loss, step.norm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--without", nargs="+", choices=FAMILIES, default=[], metavar="NAME", help="families left out")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="NAME")
    parser.add_argument("--save", action="store_true", help="write the rows into benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tallies: dict[str, dict[str, Tally]] = defaultdict(lambda: {name: Tally() for name in arguments.rules})
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    runs = [(name, seed) for name in arguments.families if name not in arguments.without for seed in seeds]
    for name, seed in progress(runs):
        families = "held out" if name.startswith("held out") else "calibration"
        rules = {rule: RULES[rule]() for rule in arguments.rules}
        follow(name, Run(FAMILIES[name], seed, arguments.steps), rules, tallies[families])
    rows = [tally.row(families, rule) for families, rules in tallies.items() for rule, tally in rules.items()]
    for row in rows:
        print(json.dumps(row))
    if arguments.save:
        facts = environment()
        with results_file("spike-detection", facts).open("a") as file:
            file.writelines(json.dumps({**facts, **vars(arguments), **row}) + "\n" for row in rows)
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("families", "rule", "false per 10,000", "hurting batches caught", "95 %", "of all bad batches")
    for row in rows:
        low, high = row["caught_interval"]
        table.add_row(
            row["families"], row["rule"], f"{row['false_per_10k']:.1f} ({row['false']}/{row['healthy_steps']})",
            f"{row['caught']:.1%} of {row['hurting']}", f"{low:.1%} to {high:.1%}", f"{row['caught_of_all']:.1%}",
        )  # fmt: skip
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
