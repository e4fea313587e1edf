# SPDX-License-Identifier: Apache-2.0
"""What every regularizing callback must do: resume bit for bit, and agree with itself over two processes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

WORKER = Path(__file__).with_name("regularizer_worker.py")
TOLERANCE = 2e-6  # eight steps in fp32; the gradients of two halves are added in another order


def load_worker():
    spec = importlib.util.spec_from_file_location("regularizer_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load_worker()
every_case = pytest.mark.parametrize("case", worker.CASES)


@pytest.fixture(autouse=True)
def own_random_numbers():
    with torch.random.fork_rng():
        yield


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """ranks[case]: what the two processes hold after it. All cases run in the same two processes, one after another."""
    folder = tmp_path_factory.mktemp("ddp")
    launched = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder), *worker.CASES],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return {case: [torch.load(folder / f"{case} {rank}.pt") for rank in range(2)] for case in worker.CASES}


def assert_equal(actual, expected, tolerance=0.0):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@every_case
def test_both_ranks_hold_the_same_bits(ranks, case):
    assert_equal(*ranks[case])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [case for case in worker.CASES if case not in worker.RANDOM])
def test_two_processes_equal_one_with_the_same_global_batch(ranks, case):
    _, expected = worker.run(case)
    assert ranks[case][0]["steps"] == expected["steps"]
    assert (expected["steps"] < 8) == (case == "early stopping")
    assert_equal(ranks[case][0]["weights"], expected["weights"], TOLERANCE)


@pytest.mark.filterwarnings("ignore")
@every_case
def test_the_callback_makes_a_difference(case):
    """Or the comparisons above would prove nothing."""
    _, with_it = worker.run(case)
    dropout = worker.CASES[case]()[1]
    plain = worker.Classifier(dropout)
    worker.make_trainer([], 4).fit(plain)
    difference = max((with_it["weights"][name] - p).abs().max().item() for name, p in plain.named_parameters())
    assert difference > 1e-3


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks.*ModelCheckpoint")
@every_case
def test_resumed_equals_uninterrupted_bit_for_bit(case, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    _, whole = worker.run(case, more=[keep], enable_checkpointing=True)
    _, resumed = worker.run(case, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_equal(resumed, whole)
