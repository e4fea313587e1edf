# SPDX-License-Identifier: Apache-2.0
"""Gradients of an open window under FSDP2, where an exception has left parameters whole: their shards have them."""

from pathlib import Path

import pytest
import torch

from tests.workers import launch


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failed")
    launch(Path(__file__).with_name("failed_window_worker.py"), folder, processes=2, timeout=100)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", ["after a validation", "forward pass of a validation", "forward pass of a batch"])
def test_a_run_goes_on_within_the_window(both, case):
    for results in both:
        for name, weight in results["whole"].items():
            assert torch.equal(results[case][name], weight), name
