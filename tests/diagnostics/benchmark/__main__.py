# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmark of GradientHealth: one JSON row per run, then the table.

python -m tests.diagnostics.benchmark --healthy 150 --faulty 150 --held-out 60 --rows build/diagnosis.jsonl
"""

import argparse
import random
import time
from pathlib import Path

from tests.diagnostics.benchmark import families, runs, table, traps
from tests.diagnostics.benchmark.faults import EXACT
from tests.diagnostics.benchmark.faults_of_data import OF_DATA
from tests.diagnostics.benchmark.faults_of_learning import LEARNING
from tests.diagnostics.benchmark.rows import written

FAULTS = (*EXACT, *LEARNING, *OF_DATA)
MIN_SCORE = 0.1  # a run that learns less is not healthy, whatever it was meant to be
OTHER_RATE = {"lr_too_high": 0.3, "lr_too_low": 3.0}
MIN_LOSS = 0.05  # a run is hurt if it loses so much of what its healthy twin learned


def drawn_healthy(index, held_out):
    """(setup, trap) by number: families in turn, traps in turn."""
    chosen = families.HELD_OUT if held_out else families.CALIBRATION
    setup = families.build(chosen[index % len(chosen)], index)
    fitting = [trap for trap in traps.TRAPS if trap.fits(setup)]
    trap = fitting[(index // len(chosen)) % len(fitting)]
    trap.apply(setup)
    return setup, trap


def healthy(index, held_out):
    """A healthy run, by number."""
    setup, trap = drawn_healthy(index, held_out)
    row = _row(setup, held_out, fault=None, trap=trap.name)
    if row["counts"] and row["primary"] in OTHER_RATE:  # an alarm; whether it was one, the other rate tells
        other, _ = drawn_healthy(index, held_out)
        other.lr_factor *= OTHER_RATE[row["primary"]]
        row["at_other_rate"] = round(runs.score(other, runs.train(other)), 3)
    return row


def drawn_fault(index, held_out, faults=FAULTS):
    """(setup, fault, strength) by number: faults in turn, in a family and with a strength drawn by the number."""
    chosen, drawn = families.HELD_OUT if held_out else families.CALIBRATION, random.Random(index)
    fitting = [fault for fault in faults if any(fault.fits(families.build(family, 0)) for family in chosen)]
    fault = fitting[index % len(fitting)]
    while True:
        setup = families.build(drawn.choice(chosen), drawn.randrange(10_000))
        if fault.fits(setup):
            break
    strength = drawn.choice(fault.strengths)
    fault.apply(setup, strength)
    return setup, fault, strength


def faulty(index, held_out, faults=FAULTS):
    """A broken run, by number."""
    setup, fault, strength = drawn_fault(index, held_out, faults)
    return _row(setup, held_out, fault=fault, strength=strength)


def _row(setup, held_out, fault, strength=None, trap=None):
    start = time.perf_counter()
    verdicts, score = runs.diagnosed(setup)
    row = dict(
        family=setup.family, seed=setup.seed, optimizer=setup.optimizer, held_out=held_out, trap=trap,
        fault=fault and fault.name, strength=strength, accepted=sorted(fault.accepted) if fault else [],
        primary=verdicts[0].symptom if verdicts else None, symptoms=[verdict.symptom for verdict in verdicts],
        layer=verdicts[0].layer if verdicts else None, onset=verdicts[0].onset_step if verdicts else None,
        score=round(score, 3),
    )  # fmt: skip
    if fault is None:
        row["counts"] = score > MIN_SCORE
    else:
        row["named"] = row["primary"] in fault.accepted
        if not fault.is_mechanical:
            row["twin"] = twin_score(setup, fault, strength)
        row["counts"] = fault.is_mechanical or score < row["twin"] - MIN_LOSS
    return {**row, "seconds": round(time.perf_counter() - start, 2)}


def twin_score(setup, fault, strength):
    """Score of the twin of a broken run."""
    twin = families.build(getattr(families, setup.family), setup.seed)
    fault.mend(twin, strength)
    return round(runs.score(twin, runs.train(twin)), 3)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--healthy", type=int, default=150)
    parser.add_argument("--faulty", type=int, default=150)
    parser.add_argument("--held-out", type=int, default=0, help="as many healthy and as many faulty runs")
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--only", nargs="*", help="names of faults")
    parser.add_argument("--rows", type=Path, help="file for one JSON row per run")
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if not arguments.only or fault.name in arguments.only]
    plan = [
        *((healthy, False, i) for i in range(arguments.healthy)),
        *((faulty, False, i) for i in range(arguments.faulty)),
        *((healthy, True, i) for i in range(arguments.held_out)),
        *((faulty, True, i) for i in range(arguments.held_out)),
    ]
    made = (
        make(arguments.first + index, held_out, *([chosen] if make is faulty else [])) for make, held_out, index in plan
    )
    print("\n".join(table.summary(written(made, arguments.rows))))


if __name__ == "__main__":
    main()
