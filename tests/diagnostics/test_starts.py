# SPDX-License-Identifier: Apache-2.0
"""A small sample of `python -m tests.diagnostics.benchmark.starts`."""

import math

import pytest

from tests.diagnostics.benchmark import starts

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("held_out", [False, True])
def test_healthy_runs_begin_far_below_what_is_called_far(held_out):
    rows = [starts.start(index, held_out) for index in range(6)]
    known = [row["start"] for row in rows if not math.isnan(row["start"])]
    assert len(known) >= 4 and all(0.5 < value < 2.5 for value in known)


def test_the_summary_counts_and_orders():
    rows = [dict(family="mlp", trap="plain", seed=seed, start=value) for seed, value in enumerate([1.0, 5.0, math.nan])]
    lines = starts.summary(rows)
    assert lines[0].startswith("known of 2 of 3") and lines[1].endswith("at most 5.00; above 4: 1")
    assert lines[2] == "  5.00: mlp, plain, seed 1" and lines[-1] == "not known: plain 1"
    assert [starts.quantile([4.0, 1.0, 2.0, 3.0], share) for share in (0.0, 0.25, 0.5, 1.0)] == [1.0, 1.0, 2.0, 4.0]
    assert starts.summary(rows[-1:]) == ["known of 0 of 1 runs"]
