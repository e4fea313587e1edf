# SPDX-License-Identifier: Apache-2.0
"""The example of the batch regimes, only shorter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_same_samples_in_very_different_numbers_of_steps(tmp_path):
    pytest.importorskip("sklearn")
    picture = tmp_path / "regimes.svg"
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / "regimes.py", "--fast", "--output", picture],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if "%" in line and "images" not in line]
    steps = {row[0]: int(row[-5].replace(",", "")) for row in rows}
    losses = {row[0]: float(row[-4]) for row in rows}
    assert steps == {"batch": 2, "mini-batch": 90, "stochastic": 2874}
    assert losses["batch"] > losses["mini-batch"]
    assert losses["batch"] > losses["stochastic"]
    assert "stochastic, 2,874 steps" in picture.read_text()
