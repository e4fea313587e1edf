# SPDX-License-Identifier: Apache-2.0
"""A sample of `make torture`: runs of each kind, killed twice."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.workers import launch


def test_runs_that_are_killed_end_as_those_that_are_not(tmp_path):
    launch(Path(__file__).with_name("kills.py"), tmp_path, "0", "3", timeout=120)
    result = torch.load(tmp_path / "result.pt")
    assert result["chains"] == result["byte-equal"] == 4 and result["kills"] >= 4
    assert all(counts["resumes"] >= 1 for counts in result["kinds"].values())  # from before the first step
