# SPDX-License-Identifier: Apache-2.0
"""Processes that are forked, spawned or started anew give the same run."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.workers import launch


@pytest.mark.slow
def test_forked_spawned_and_started_processes_give_the_same_weights(tmp_path):
    launch(Path(__file__).with_name("start_methods_worker.py"), tmp_path, timeout=200)
    results = torch.load(tmp_path / "result.pt")
    assert [*results] == ["fork", "spawn", "popen"]
    for name, tensors in results.items():
        torch.testing.assert_close(tensors, results["popen"], rtol=0, atol=0, msg=name)
