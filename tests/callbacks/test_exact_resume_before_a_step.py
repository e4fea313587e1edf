# SPDX-License-Identifier: Apache-2.0
"""States of optimizers that are not there yet, under FSDP2: saving them changes nothing, and neither does resuming.

torch takes an empty step, with gradients of zero, to have a state that it can read; it is none of the run.
"""

from pathlib import Path

import pytest
import torch

from tests.workers import launch, load_worker

WORKER = Path(__file__).with_name("before_a_step_worker.py")
worker = load_worker(WORKER)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder, and what both processes found."""
    folder = tmp_path_factory.mktemp("before a step")
    launch(WORKER, folder, processes=2, timeout=180)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", worker.KINDS)
@pytest.mark.parametrize("case", worker.CASES)
def test_neither_the_run_that_saves_nor_the_one_that_resumes_is_another(found, case, kind):
    for results in found[1]:
        alone, *others = results[case, kind]
        for each in others:
            torch.testing.assert_close(each, alone, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", worker.KINDS)
def test_one_process_goes_on_from_it(found, kind):
    folder, _ = found
    arguments, _, _ = worker.CASES[worker.OF_ONE_PROCESS]
    with torch.random.fork_rng():
        alone, resumed = worker.Net(**arguments), worker.Net(**arguments)
        worker.fit("one", alone)
        worker.fit("one", resumed, ckpt_path=folder / f"{worker.OF_ONE_PROCESS} {kind}.ckpt")
    torch.testing.assert_close(worker.weights(resumed), worker.weights(alone), rtol=0, atol=1e-6)


def test_such_a_file_has_no_state(found):
    folder, _ = found
    (state,) = torch.load(folder / f"{worker.OF_ONE_PROCESS} full.ckpt", weights_only=False)["optimizer_states"]
    assert state["state"] == {}
