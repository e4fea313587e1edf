# SPDX-License-Identifier: Apache-2.0
"""The benchmark harness: rows are kept as they come, and turns favor no variant."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_norms
import bench_rules
import bench_step
import harness


def row(ratio=2.0):
    return harness.Row("some", "a case", "ours", "theirs", 1, 1.0, 0.1, ratio, 4.0, 4.0, 0.5, 1.0)


def test_a_run_cut_short_keeps_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)

    def rows():
        yield row(2.0)
        yield row(3.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.report(rows(), save=True)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (path,) = tmp_path.iterdir()
    assert [one["ratio"] for one in printed] == [2.0, 3.0]
    assert [json.loads(line) for line in path.read_text().splitlines()] == printed
    assert path.name.endswith(".jsonl") and "some" in path.name and printed[0]["torch"] == torch.__version__


def test_rows_come_back_and_a_table_says_what_was_missed(capsys):
    assert harness.report(iter([row(2.0), row(0.5)]), save=False) == [row(2.0), row(0.5)]
    table = capsys.readouterr().err
    assert ">= 1x met" in table and ">= 1x MISSED" in table


@pytest.mark.parametrize(("seconds", "per_turn"), [(0.0, 3), (1.0, 1)])
def test_variants_take_turns_and_a_long_call_is_measured_each_time(monkeypatch, seconds, per_turn):
    calls = []

    def timed(call):
        call()
        return seconds

    monkeypatch.setattr(harness, "seconds", timed)
    variants = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    times = harness.interleaved(variants, 0.0)
    turn = per_turn + (per_turn == 3)  # a short call is made once more, unmeasured, at the start of a turn
    assert calls[:4] == ["a", "b", "a", "b"]  # the first, and the one that determines whether calls are long
    assert calls[4 : 4 + 2 * turn] == ["a"] * turn + ["b"] * turn
    assert len(times["a"]) == len(times["b"]) == (6 if per_turn == 3 else 3)


def test_a_ratio_is_the_median_over_neighbors():
    assert harness.ratio([4.0, 90.0, 6.0], [2.0, 30.0, 2.0]) == 3.0


@pytest.mark.parametrize("count", [1, 2])
def test_each_benchmark_runs_the_threads_that_its_rows_name(threads, count):
    kind = bench_norms.KINDS[0]
    measures = [
        lambda: bench_norms.measure(kind, (2, 3, "fp32", True), "forward", count, 0.0, 1.0, chain=2),
        lambda: bench_rules.measure("two", [(2, 2)], ("SGD", {"lr": 0.1}, {}), count, 0.0, 1.0),
        lambda: bench_step.measure(bench_step.COMPARISONS[0], bench_step.SMALL, count, 0.0, 1.0),
    ]
    for measure in measures:
        threads(3 - count)
        one = measure()
        assert one.threads == torch.get_num_threads() == count and one.ratio > 0
