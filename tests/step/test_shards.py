# SPDX-License-Identifier: Apache-2.0
"""Parameters sharded over two processes, against the same training in one."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.workers import launch

WORKER = Path(__file__).with_name("sharded_worker.py")
SPEC = importlib.util.spec_from_file_location("sharded_step_worker", WORKER)
worker = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(worker)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output = tmp_path_factory.mktemp("sharded") / "results.pt"
    launch(WORKER, output, processes=2, timeout=250)
    return torch.load(output)


@pytest.mark.parametrize("name", worker.CASES)
def test_two_processes_train_as_one(results, name):
    optimizer_class, kwargs = worker.CASES[name]
    net = worker.build()
    optimizer = optimizer_class(net.parameters(), **kwargs)
    worker.train(net, optimizer, 4)
    expected = worker.held(net, optimizer)
    torch.testing.assert_close(results[name]["params"], expected["params"], rtol=0, atol=1e-6)
    torch.testing.assert_close(results[name]["state"], expected["state"], rtol=0, atol=1e-6)
    assert results[name]["norm"] == (expected["norm"] and pytest.approx(expected["norm"], rel=1e-6))
    assert results[name]["learned"] == pytest.approx(expected["learned"], rel=1e-5)
    assert len(expected["statistics"]) == 4 * (name == "norm and ema")
    torch.testing.assert_close(results[name]["statistics"], expected["statistics"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", worker.CASES | worker.COARSE)
def test_a_checkpoint_of_shards_gives_back_the_state(results, name):
    loaded, saved = results[f"{name}, loaded"], results[name]
    torch.testing.assert_close(loaded["params"], saved["params"], rtol=0, atol=0)
    torch.testing.assert_close(loaded["state"], saved["state"], rtol=0, atol=0)
    assert loaded["learned"] == saved["learned"]


def test_split_weights_are_sharded_with_their_parameters(results):
    exported, again = results["split weights"]
    expected, _ = worker.split_weights()
    for name, value in expected.items():
        assert value.dtype == torch.float32
        assert torch.equal(exported[name], value)
        assert torch.equal(again[name], value)
