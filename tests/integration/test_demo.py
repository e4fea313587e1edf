# SPDX-License-Identifier: Apache-2.0
"""The demo as a newcomer runs it, but shorter."""

import os
import re
import subprocess
import sys

import pytest


def run_demo(report):
    pytest.importorskip("sklearn")
    result = subprocess.run(
        [sys.executable, "-m", "lightning_optkit", "demo", "--fast", "--report", report],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120", "PYTHONHASHSEED": "random"},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result


def table_of(screen):
    """First column -> the two others."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in screen.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) == 3}


def test_the_demo_shows_what_it_did_and_two_runs_of_it_agree(tmp_path):
    first, second = (run_demo(tmp_path / f"{name}.html") for name in ("first", "second"))

    table = table_of(first.stdout)
    for row in ("val_acc, last", "val_loss, last", "training loss, last 5 %"):
        assert table[row] == table_of(second.stdout)[row]
    accuracies = [float(cell) for cell in table["val_acc, last"]]
    assert min(accuracies) > 0.5 and accuracies[0] == pytest.approx(accuracies[1], abs=0.01)
    assert table["optimizer steps"] == ["69", "69"]
    assert table["after the backward pass"] == ["clip, step, average", "one pass"]
    for row in ("optimizer tail, median (ms)", "training step, median (ms)"):
        plain, fused = table[row]
        assert float(plain) > 0 and re.fullmatch(
            r"[\d.]+ \(([\d.]+x (faster|slower)|the same( within the spread of the steps)?)\)", fused
        )
    assert "ClipNorm(max_norm=1.0) > update > decay(0.05) > EMA(decay=0.98" in first.stdout

    assert "Epoch 2/2" in first.stdout  # Lightning's progress bar
    for chatter in ("Warning", "Tip:", "GPU available", "Traceback"):
        assert chatter not in first.stdout + first.stderr

    report = tmp_path / "first.html"
    assert first.stdout.splitlines()[-1] == f"Report: {report}"
    page = report.read_text()
    assert page.count("<svg") == 11 and "http" not in page
    assert table["val_acc, last"][0] in page and "EMA(decay=0.98" in page
