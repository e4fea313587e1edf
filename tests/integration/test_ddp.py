# SPDX-License-Identifier: Apache-2.0
"""Two gloo processes under DDP with Fuse, against one process with the same global batch."""

from pathlib import Path

import pytest
import torch

from tests.workers import launch, load_worker

WORKER = Path(__file__).with_name("ddp_worker.py")
TOLERANCE = 1e-6  # six steps in fp32; the gradients of two halves are added in another order


worker = load_worker(WORKER)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """ranks[case]: what the two processes hold after it. All cases run in the same two processes, one after another."""
    folder = tmp_path_factory.mktemp("ddp")
    launch(WORKER, folder, *worker.CASES, processes=2, timeout=120)
    return {case: [torch.load(folder / f"{case} {rank}.pt") for rank in range(2)] for case in worker.CASES}


@pytest.mark.parametrize("case", worker.CASES)
def test_both_ranks_hold_the_same_bits(ranks, case):
    first, second = ranks[case]
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", worker.CASES)
def test_two_processes_equal_one_with_the_same_global_batch(ranks, case):
    with torch.random.fork_rng():
        _, expected = worker.run(**worker.CASES[case])
    assert ranks[case][0]["steps"] == expected["steps"] == 6
    # Under 16-mixed the gradients themselves are rounded to fp16: 2**-11 of each, six steps of lr 0.1.
    tolerance = 6 * 0.1 * 2**-11 if case == "skip" else TOLERANCE
    torch.testing.assert_close(ranks[case][0], expected, rtol=0, atol=tolerance)


def test_an_infinite_gradient_on_one_rank_skips_the_step_on_both(ranks):
    for result in ranks["skip"]:
        assert {float(state["step"]) for state in result["state"].values()} == {5.0}
        assert {float(state["num_averaged"]) for state in result["state"].values()} == {3.0}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["norms", "sharded norms"])
def test_fused_norms_equal_torchs_and_are_given_back(ranks, case):
    with torch.random.fork_rng():
        _, torchs = worker.run(**worker.CASES[case], fuse_norms=False)
    assert torchs.pop("fused") == 0 and torchs.pop("torchs")
    for result in ranks[case]:
        assert result["fused"] == 12 and result["torchs"]
        torch.testing.assert_close({name: result[name] for name in torchs}, torchs, rtol=0, atol=TOLERANCE)
