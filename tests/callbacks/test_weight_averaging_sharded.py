# SPDX-License-Identifier: Apache-2.0
"""WeightAveraging in two gloo processes: DDP, and parameters sharded by FSDP2, against one process."""

from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import update_bn

from tests.workers import launch, load_worker

WORKER = Path(__file__).with_name("weight_averaging_worker.py")
TOLERANCE = 1e-5  # six steps of AdamW at rate 0.05; gradients of two halves are added in another order


worker = load_worker(WORKER)
SHARDED = [case for case, arguments in worker.CASES.items() if arguments["strategy"].endswith("files")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """ranks[case]: what the two processes found. All cases run in the same two processes, one after another."""
    folder = tmp_path_factory.mktemp("averages")
    with torch.random.fork_rng():
        trainer = worker.trainer_of("one", [worker.WeightAveraging(worker.EMA(0.5))], epochs=2)
        trainer.fit(worker.Regression(frozen=True))
    trainer.save_checkpoint(folder / worker.FROZEN)
    launch(WORKER, folder, *worker.CASES, processes=2, timeout=180)
    found = {case: [torch.load(folder / f"{case} {rank}.pt") for rank in range(2)] for case in worker.CASES}
    found["frozen"] = [folder / worker.FROZEN, *(torch.load(folder / f"frozen {rank}.pt") for rank in range(2))]
    found["rings"] = [torch.load(folder / f"rings {rank}.pt") for rank in range(2)]
    return found | {"Lightning's own": (folder / "Lightning's own.txt").read_text()}


def assert_equal(actual, expected, tolerance=0.0):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", worker.CASES)
def test_both_ranks_see_the_same_bits(ranks, case):
    first, second = ranks[case]
    assert first["explained"] == second["explained"]
    for what in ("weights", "second"):
        assert_equal(first[what], second[what])
    if case != "ddp, SWA, BatchNorm":  # between two recomputations each rank tracks statistics of its own data
        assert_equal(first["seen"], second["seen"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [case for case in worker.CASES if "BatchNorm" not in case])
def test_two_processes_equal_one_with_the_same_global_batch(ranks, case, tmp_path):
    with torch.random.fork_rng():
        _, expected = worker.run(tmp_path, **{**worker.CASES[case], "strategy": "one"})
    actual = ranks[case][0]
    for what in ("weights", "second", "seen"):
        assert_equal(actual[what], expected[what], TOLERANCE)
    assert list(actual["seen"]) == [2, 4, 6]


@pytest.mark.parametrize("case", [case for case in worker.CASES if case.startswith("ddp")])
def test_both_ranks_know_the_snapshots_that_one_of_them_wrote(ranks, case):
    first, second = ranks[case]
    assert first["snapshots"] == second["snapshots"]
    steps = [torch.load(path, weights_only=True)["global_step"] for path in first["snapshots"]]
    assert steps == [2, 4, 6]


@pytest.mark.parametrize("case", SHARDED)
def test_the_average_lives_on_the_shard(ranks, case):
    for result in ranks[case]:
        shapes = set(result["local shapes"].values())
        assert shapes == {(4, 4)}  # of a weight (8, 4) on two ranks
        assert len(result["local shapes"]) == (5 if "LAWA" in case else 4 if "another order" in case else 3)


@pytest.mark.parametrize("case", SHARDED)
def test_resumed_equals_uninterrupted_bit_for_bit(ranks, case):
    for result in ranks[case]:
        resumed = result["resumed"]
        assert_equal(resumed["weights"], result["weights"])
        assert_equal(resumed["second"], result["second"])
        assert_equal(resumed["seen"][6], result["seen"][6])


@pytest.mark.filterwarnings("ignore")
def test_a_file_of_one_process_with_a_frozen_layer_resumes_over_shards(ranks):
    """Such a file has what is frozen only once, in its `state_dict`."""
    file, *results = ranks["frozen"]
    saved = torch.load(file)
    assert "net.0.weight" in saved["state_dict"].keys() - saved["current_model_state"].keys()
    with torch.random.fork_rng():
        expected = worker.resumed_with_frozen("one", file)
    for result in results:
        assert_equal(result["began"], {**saved["state_dict"], **saved["current_model_state"]})
        assert_equal(result["weights"], expected["weights"], TOLERANCE)


@pytest.mark.parametrize("place", range(len(worker.RINGS)), ids=map(str, worker.RINGS))
def test_shards_go_on_with_another_number_of_snapshots(ranks, place):
    for rings in ranks["rings"]:
        assert_equal(*rings[place], TOLERANCE)


@pytest.mark.parametrize("case", SHARDED)
def test_validation_from_a_file_sees_the_average(ranks, case):
    for result in ranks[case]:
        assert_equal(result["from the file"], result["weights"])


@pytest.mark.parametrize("case", worker.CASES)
def test_a_file_of_weights_only_exports_the_average(ranks, case):
    result = ranks[case][0]
    assert_equal(result["exported"], result["seen"][4])


def test_lightnings_own_cannot_average_shards(ranks):
    """The defect; ours in the same place is all of the above."""
    assert "FSDP does not support deepcopy" in ranks["Lightning's own"]


def test_statistics_of_batch_norm_are_those_of_all_processes(ranks):
    """Against torch's update_bn over the batches of both ranks, with the average that they hold."""
    actual = ranks["ddp, SWA, BatchNorm"][0]["weights"]
    with torch.random.fork_rng():
        module = worker.Regression(norm=True)
    module.load_state_dict(actual)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 4, generator=generator)
    update_bn([x[[0, 2]], x[[4, 6]], x[[1, 3]], x[[5, 7]]], module)
    for name in ("running_mean", "running_var"):
        assert_equal(actual[f"net.1.{name}"], module.state_dict()[f"net.1.{name}"], 1e-6)


def test_it_says_how_each_average_is_kept(ranks):
    lawa, ema = ranks["ddp, LAWA, folded EMA"][0]["explained"]
    assert lawa.startswith("LAWA(k=3, every=1, start=1): a pass of its own (no step keeps snapshots) after the step of")
    assert ema.startswith("EMA(decay=0.5, start=1, every=1): folded into the step of AdamW, as state 'ema'")
