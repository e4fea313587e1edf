# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the callbacks runs what its rows say."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import lightning_optkit as ok

BENCH = Path(__file__).parents[2] / "benchmarks" / "bench_stack.py"


@pytest.mark.filterwarnings("ignore")
def test_a_row_per_variant_with_its_ratio_to_the_plain_run(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("bench_stack", BENCH)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    assert [type(callback) for callback in bench.stack()] == [
        ok.Fuse, ok.GradientClipping, ok.LRSchedule, ok.WeightAveraging,
    ]  # fmt: skip
    monkeypatch.setattr(bench, "STEPS", 5)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(bench.logging.Logger, "setLevel", lambda self, level: None)
    monkeypatch.setattr(sys, "argv", ["bench_stack.py", "--runs", "2"])
    bench.main()
    first, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("{", "|"))]
    milliseconds = json.loads(first)["ms"]
    assert [*milliseconds] == [*bench.VARIANTS] and min(milliseconds.values()) > 0
    for name, row in zip(bench.VARIANTS, rows, strict=True):
        shown, _, ratio = (cell.strip() for cell in row.strip("|").split("|"))
        assert shown == name and float(ratio) == pytest.approx(milliseconds[name] / milliseconds["plain"], abs=0.02)
