# SPDX-License-Identifier: Apache-2.0
"""What is measured under FSDP2, of which a validation leaves parameters that the next backward pass frees."""

from pathlib import Path

import pytest
import torch

from tests.workers import launch


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validated")
    launch(Path(__file__).with_name("after_validation_worker.py"), folder, processes=2, timeout=100)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_what_is_measured_does_not_depend_on_validations(both):
    for seen in both:
        assert {*seen["not"]["curves"]["grad_norm"]} == {"net.0", "net.2"}
        assert seen["validated"] == seen["not"]


def test_gradients_that_arrive_are_seen_under_fsdp(both):
    for seen in both:
        (verdict,) = seen["idle"]["verdicts"]
        assert "nothing is left of the gradients when the step is taken" in verdict
