# SPDX-License-Identifier: Apache-2.0
"""ReleaseGradients in two gloo processes: FSDP2 bitwise as in the ordinary run, and what is refused."""

from pathlib import Path

import pytest
import torch

from tests.workers import launch, load_worker

WORKER = Path(__file__).with_name("release_gradients_worker.py")


worker = load_worker(WORKER)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """ranks[case]: what the two processes found. All cases run in the same two processes, one after another."""
    folder = tmp_path_factory.mktemp("released")
    cases = [*worker.CASES, *worker.REFUSED]
    launch(WORKER, folder, *cases, processes=2, timeout=180)
    return {case: [torch.load(folder / f"{case} {rank}.pt") for rank in range(2)] for case in cases}


@pytest.mark.parametrize("case", worker.CASES)
def test_sharded_parameters_and_their_state_are_bitwise_those_of_the_ordinary_run(ranks, case):
    for found in ranks[case]:
        released, ordinary = found[True], found[False]
        torch.testing.assert_close(released["tensors"], ordinary["tensors"], rtol=0, atol=0)
        torch.testing.assert_close(released["losses"], ordinary["losses"], rtol=0, atol=0)
        assert released["steps"] == ordinary["steps"] == 12
        assert len(released["losses"]) == 12 and released["losses"][-1] < released["losses"][3]


def test_no_shard_of_a_gradient_is_left(ranks):
    for found in ranks["plain"]:
        assert max(found[True]["left"]) == 0 < min(found[False]["left"])
        assert max(found[True]["alive"]) == 2  # FSDP2 completes the two of a layer together


def test_what_needs_whole_gradients_is_refused_in_every_process(ranks):
    for message in ranks["ddp"]:
        assert message == (
            "ReleaseGradients(): DDPStrategy may still change a gradient that the backward pass has completed; use one "
            "device, or ModelParallelStrategy (FSDP2)."
        )
