# SPDX-License-Identifier: Apache-2.0
"""How far above that of a constant prediction the loss of healthy runs begins.

What `optkit doctor` calls far rests on it. Healthy runs of the benchmark, of which the first step is taken; known where
the loss is that of one function of torch.

python -m tests.diagnostics.benchmark.starts --runs 300 --held-out 150
"""

import argparse
import math
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import torch

import lightning_optkit as ok
from lightning_optkit.cli.high_start import _FAR, start_of
from tests.diagnostics.benchmark import runs
from tests.diagnostics.benchmark.__main__ import drawn_healthy
from tests.diagnostics.benchmark.rows import written

SHARES = (0.5, 0.9, 0.99)


class _Start(pl.Callback):
    """Stands behind `GradientHealth`, which forgets what it has seen when the fit is over."""

    def __init__(self, health):
        self._health, self.value = health, math.nan

    def on_train_end(self, trainer, pl_module):
        self.value = start_of(self._health._seen)


def start(index, held_out):
    """One run by number: its first loss, in that of a constant prediction; NaN if that is not known."""
    setup, trap = drawn_healthy(index, held_out)
    if setup.prepare is not None:
        setup.prepare(setup)
    health = ok.GradientHealth(verbose=False, probe=False)
    torch.manual_seed(setup.seed)
    setup.trainer |= {"max_steps": 1, "limit_train_batches": 1}
    seen = _Start(health)
    runs.train(setup, health, seen)
    return dict(family=setup.family, trap=trap.name, seed=setup.seed, start=seen.value)


def quantile(values, share):
    """The least of the values that so large a share of them does not exceed.

    >>> quantile([3.0, 1.0, 2.0, 4.0], 0.5)
    2.0
    """
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]


def summary(rows):
    """Lines with the counts, the quantiles and the highest starts."""
    known = [row for row in rows if not math.isnan(row["start"])]
    if not known:
        return [f"known of 0 of {len(rows)} runs"]
    values = [row["start"] for row in known]
    quantiles = ", ".join(f"{share:.0%} below {quantile(values, share):.2f}" for share in SHARES)
    lines = [
        f"known of {len(known)} of {len(rows)} runs, in times the loss of a constant prediction:",
        f"{quantiles}, at most {max(values):.2f}; above {_FAR:g}: {sum(value > _FAR for value in values)}",
    ]
    for row in sorted(known, key=lambda row: -row["start"])[:3]:
        lines.append(f"  {row['start']:.2f}: {row['family']}, {row['trap']}, seed {row['seed']}")
    unknown = Counter(row["trap"] for row in rows if math.isnan(row["start"]))
    if unknown:
        lines.append("not known: " + ", ".join(f"{trap} {count}" for trap, count in unknown.most_common()))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--held-out", type=int, default=150)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--rows", type=Path, help="file for one JSON row per run")
    arguments = parser.parse_args()
    planned = (
        start(index, held_out)
        for held_out, count in ((False, arguments.runs), (True, arguments.held_out))
        for index in range(arguments.first, arguments.first + count)
    )
    print("\n".join(summary(written(planned, arguments.rows))))


if __name__ == "__main__":
    main()
