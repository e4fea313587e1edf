# SPDX-License-Identifier: Apache-2.0
"""A small sample of the benchmark in `benchmark/`, whose whole is `make diagnosis`, and the statistics of its table."""

import pytest

from tests.diagnostics.benchmark import families, table
from tests.diagnostics.benchmark.__main__ import FAULTS, faulty, healthy

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("index", range(0, 260, 13))
def test_healthy_runs_have_no_verdict(index):
    row = healthy(index, held_out=False)
    assert row["symptoms"] == [], row


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_is_named(fault):
    rows = (faulty(index, held_out=False, faults=[fault]) for index in range(1, 7))
    row = next(row for row in rows if row["named"] or row["counts"])  # a fault that does no harm has no name
    assert row["named"], row


def test_families_are_apart_and_every_symptom_that_is_accepted_can_be_named():
    assert not {*families.CALIBRATION} & {*families.HELD_OUT}
    from lightning_optkit.diagnostics.verdict import SYMPTOMS

    assert {symptom for fault in FAULTS for symptom in fault.accepted} <= {*SYMPTOMS}


def test_intervals():
    """Wilson 1927; the numbers are those that statistical tables print for them."""
    for hits, total, low, high in ((57, 60, 0.863, 0.983), (95, 100, 0.888, 0.978), (285, 300, 0.919, 0.969)):
        assert table.wilson(hits, total) == pytest.approx((low, high), abs=6e-4)
    assert table.wilson(0, 0) == (0.0, 1.0)
    for total, bound in ((20, 0.139), (60, 0.049), (300, 0.010)):
        assert table.at_most(total) == pytest.approx(bound, abs=6e-4)


def test_the_table_counts_what_comes_first():
    def row(primary, symptoms, counts=True, held_out=False):
        return dict(
            fault="nan", accepted=["nonfinite"], primary=primary, symptoms=symptoms, named=primary == "nonfinite",
            counts=counts, held_out=held_out,
        )  # fmt: skip

    rows = [
        row("nonfinite", ["nonfinite"]),
        row("wrong_mode", ["wrong_mode", "nonfinite"]),
        row(None, [], counts=False),
    ]
    lines = table.summary(rows)
    assert lines[0] == "faults named first, calibration: 1/2 = 50 % (9 to 91)"
    assert "left out" in lines[1] and lines[-1].endswith("| 1/2 = 50 % (9 to 91) | 2 | wrong_mode 1 |")


def test_an_alarm_of_a_rate_stands_beside_what_another_rate_learns():
    healthy = dict(fault=None, family="mlp", trap="LoRA", seed=7, counts=True, held_out=False, symptoms=["lr_too_high"])
    other = {**healthy, "primary": "nonfinite"}
    rows = [{**healthy, "primary": "lr_too_high", "score": 0.21, "at_other_rate": 0.8}, other]
    assert table.summary(rows)[1:3] == [
        "  mlp, LoRA, seed 7: lr_too_high (score 0.21, at the other rate 0.80)",
        "  mlp, LoRA, seed 7: nonfinite",
    ]
