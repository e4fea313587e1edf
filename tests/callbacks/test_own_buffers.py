# SPDX-License-Identifier: Apache-2.0
"""ExactResume saves the buffers in which processes differ, and gives each process its own."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.workers import launch, load_worker

WORKER = Path(__file__).with_name("own_buffers_worker.py")
worker = load_worker(WORKER)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("buffers")
    launch(WORKER, folder, processes=2, timeout=150)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("place", worker.PLACES)
@pytest.mark.parametrize("name", ["full", "sharded", "ddp", "averaged", "window"])
def test_each_process_goes_on_with_its_own(results, name, place):
    mean = "net.1.running_mean"
    assert not torch.equal(*(each[name]["whole"]["trained"][mean] for each in results[1]))
    assert not torch.equal(*(each[name]["whole"]["averaged"][mean] for each in results[1]))
    for each in results[1]:
        torch.testing.assert_close(each[name][place], each[name]["whole"], rtol=0, atol=0)


def test_only_those_that_differ_are_saved(results):
    for path in (results[0] / "full" / "batch.ckpt", results[0] / "sharded" / "batch.ckpt" / "meta.pt"):
        ranks = torch.load(path, weights_only=True)["callbacks"]["ExactResume"]["ranks"]
        for each in ranks:
            own = {name for name in each["buffers"] if "WeightAveraging" not in name}
            assert own == {"net.1.running_mean", "net.1.running_var"} and len(each["buffers"]) == 4


def test_none_are_saved_where_those_of_the_first_process_replace_the_others(results):
    saved = torch.load(results[0] / "replaced" / "batch.ckpt", weights_only=True)["callbacks"]["ExactResume"]["ranks"]
    assert [each["buffers"] for each in saved] == [{}, {}]


@pytest.mark.parametrize("name", ["look_sam", "overflow"])
def test_each_process_goes_on_with_its_own_direction(results, name):
    for each in results[1]:
        whole, resumed = each[name]
        assert all(value.isfinite().all() for value in whole.values())
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    ranks = torch.load(results[0] / name / "batch.ckpt", weights_only=True)["callbacks"]["ExactResume"]["ranks"]
    sizes = [[part.numel() for key, part in each["buffers"].items() if "LookSAM" in key] for each in ranks]
    assert all(sizes[0]) and len(sizes[0]) == 6 and any(sizes[1]) == (name == "look_sam")
