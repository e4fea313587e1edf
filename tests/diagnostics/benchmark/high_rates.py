# SPDX-License-Identifier: Apache-2.0
"""Does the remedy of `lr_too_high` cure where the rate is far too high: 1, 10 and 100, with four optimizers.

Each is a healthy run of the benchmark at that rate; what stands in front of the first ", or" of the remedy is pasted.
It is cured if its score is less than `MIN_LOSS` below that of the run at its own rate. Rates that do no harm are left
out.

python -m tests.diagnostics.benchmark.high_rates --seeds 2 --rows build/high_rates.jsonl
"""

import argparse
from pathlib import Path

from tests.diagnostics.benchmark import families, runs
from tests.diagnostics.benchmark.__main__ import MIN_LOSS
from tests.diagnostics.benchmark.remedies import paste
from tests.diagnostics.benchmark.rows import written
from tests.diagnostics.benchmark.table import claim

OPTIMIZERS, RATES = ("sgd_plain", "sgd", "adam", "adamw"), (1.0, 10.0, 100.0)


def _setup(family, seed, optimizer, rate=None):
    setup = families.build(family, seed)
    setup.optimizer = optimizer
    setup.trainer.pop("precision", None)
    if rate is not None:
        setup.lrs, setup.lr_factor = (rate, rate / 4 if optimizer == "sgd_plain" else rate), 1.0
    return setup


def run(family, seed, optimizer, rate, healthy):
    """One run, and its repetition with the remedy pasted; None if the rate does no harm."""
    setup = _setup(family, seed, optimizer, rate)
    verdicts, score = runs.diagnosed(setup)
    if score >= healthy - MIN_LOSS:
        return None
    row = dict(
        family=setup.family, seed=seed, optimizer=optimizer, rate=rate, score=round(score, 3), twin=round(healthy, 3),
        primary=verdicts[0].symptom if verdicts else None, remedy=verdicts[0].remedy if verdicts else None, cured=None,
    )  # fmt: skip
    if row["primary"] == "lr_too_high":
        again = _setup(family, seed, optimizer, rate)
        row["pasted"] = paste(again, verdicts[0].remedy)
        later, after = runs.diagnosed(again)
        row |= dict(after=round(after, 3), cured=after >= healthy - MIN_LOSS, then=[v.symptom for v in later])
    return row


def planned(chosen, seeds, first=0, optimizers=OPTIMIZERS, rates=RATES):
    """All runs of these families that are hurt."""
    for family in chosen:
        for seed in range(first, first + seeds):
            for optimizer in optimizers:
                twin = _setup(family, seed, optimizer)
                healthy = runs.score(twin, runs.train(twin))
                for rate in rates:
                    row = run(family, seed, optimizer, rate, healthy)
                    if row is not None:
                        yield row


def summary(rows):
    """Lines of the counts, by optimizer and by rate."""
    named = [row for row in rows if row["cured"] is not None]
    lines = [
        f"hurt: {len(rows)}; named lr_too_high: {len(named)}",
        f"cured: {claim(sum(row['cured'] for row in named), len(named))}",
    ]
    for key, values in (("optimizer", OPTIMIZERS), ("rate", RATES)):
        for value in values:
            of_value = [row for row in named if row[key] == value]
            lines.append(f"  {value}: {sum(row['cured'] for row in of_value)}/{len(of_value)}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--held-out", action="store_true", help="the held-out families")
    parser.add_argument("--rows", type=Path, help="file for one JSON row per run")
    arguments = parser.parse_args()
    chosen = families.HELD_OUT if arguments.held_out else families.CALIBRATION
    print("\n".join(summary(written(planned(chosen, arguments.seeds, arguments.first), arguments.rows))))


if __name__ == "__main__":
    main()
