# SPDX-License-Identifier: Apache-2.0
import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.workers import launch, load_worker

WORKER = Path(__file__).parents[1] / "parameter_numbers_worker.py"
worker = load_worker(WORKER)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process has after three epochs, and what two made of its second epoch."""
    folder, whole = tmp_path_factory.mktemp("numbers"), {}
    for case in worker.CASES:
        trainer, _ = worker.run(case, 1)
        trainer.save_checkpoint(folder / f"{case}.ckpt")
        whole[case] = [worker.run(case, epochs)[1] for epochs in (2, 3)]
    trainer, _ = worker.run("Fuse", 1, without=True)
    trainer.save_checkpoint(folder / "without.ckpt")
    launch(WORKER, folder, processes=2, timeout=100)
    return folder, whole, torch.load(folder / "0.pt")


@pytest.mark.parametrize("case", worker.CASES)
def test_fsdp2_goes_on_as_one_process_does(results, case):
    _, whole, sharded = results
    torch.testing.assert_close(sharded[case], whole[case][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", worker.CASES)
def test_one_process_goes_on_as_fsdp2_does(results, case):
    folder, whole, _ = results
    _, weights = worker.run(case, 3, folder / f"{case} sharded.ckpt")
    torch.testing.assert_close(weights, whole[case][1], rtol=0, atol=1e-6)


def test_a_file_that_does_not_say_whose_state_is_whose_is_refused(results):
    message = results[2]["refused"]
    assert "without.ckpt does not say which state is of which parameter" in message and "save it again" in message


def test_numbers_are_places_in_the_module_and_load_in_torch(results):
    folder = results[0]
    (saved,) = torch.load(folder / "Fuse.ckpt", weights_only=True)["optimizer_states"]
    assert [group["params"] for group in saved["param_groups"]] == [[1, 3], [0, 2]]
    assert sorted(saved["state"]) == [0, 1, 2, 3]
    module = worker.Regression(True)
    optimizer = module.configure_optimizers()
    optimizer.load_state_dict(copy.deepcopy(saved))
    for place, param in enumerate(module.parameters()):
        assert torch.equal(optimizer.state[param]["exp_avg"], saved["state"][place]["exp_avg"])


def test_parameters_of_others_have_numbers_behind_the_modules(tmp_path):
    trainer, _ = worker.run("Fuse", 1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2)), trainer.lightning_module.net[3].weight])
    state, behind = trainer.strategy.optimizer_state(optimizer), len([*trainer.lightning_module.parameters()])
    assert state["param_groups"][0]["params"] == [behind, 3]
    assert [*state["parameter_names"]] == [3] and state["nameless_shapes"] == {behind: (2,)}
