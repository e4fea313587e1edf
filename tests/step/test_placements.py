# SPDX-License-Identifier: Apache-2.0
"""Parameters placed in many ways over four processes, stepped by the same gradients as whole ones."""

from pathlib import Path

import pytest
import torch

from lightning_optkit._native import extension
from tests.workers import launch, load_worker

WORKER = Path(__file__).with_name("placements_worker.py")
worker = load_worker(WORKER)
every_case = pytest.mark.parametrize(("name", "kind"), worker.CASES)
every_placement = pytest.mark.parametrize("kind", worker.PLACED)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("placements")
    launch(WORKER, folder, timeout=280)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 3)]


@every_case
def test_the_step_is_that_of_whole_parameters(ranks, name, kind):
    expected = worker.run(name)
    close = dict(rtol=1e-12, atol=1e-12) if worker.dtype_of(name) == torch.float64 else dict(rtol=2e-6, atol=2e-7)
    for found in (rank[name, kind] for rank in ranks):
        assert found["counts"] == expected["counts"]
        torch.testing.assert_close(found["params"], expected["params"], **close)
        torch.testing.assert_close(found["state"], expected["state"], **close)
        torch.testing.assert_close(found["norms"], expected["norms"], rtol=1e-6, atol=0.0, equal_nan=True)
        torch.testing.assert_close(found["statistics"], expected["statistics"], rtol=1e-5, atol=1e-9)


@every_case
def test_all_processes_agree(ranks, name, kind):
    first, last = (rank[name, kind] for rank in ranks)
    torch.testing.assert_close(first, last, rtol=0, atol=0, equal_nan=True)


def test_a_gradient_that_is_a_sum_of_parts_is_added_up(ranks):
    """The sum over the processes is 0 + 1 + 2 + 3."""
    for found in (rank["partial"] for rank in ranks):
        assert [each.tolist() for each in found] == [[-5.0] * 3, [-11.0] * 3]


def test_a_parameter_that_is_a_sum_of_parts_is_refused_when_the_optimizer_is_built(ranks):
    assert ranks[0]["refused"] == (
        "SGD(params=...): a parameter is a sum over processes (Partial); all must be sharded or replicated."
    )


def test_the_explanation_says_what_is_gathered(ranks):
    paths = ranks[0]["paths"]
    gathered = {key: path.partition(", gathered in every process to ")[2] for key, path in paths.items()}
    rows = ("units", "units, PyTorch", "centralize")
    assert {name for name, kind in gathered if kind == "tp" and gathered[name, kind].endswith("its rows")} >= {*rows}
    assert not any(gathered[name, "fsdp"] for name in rows)
    assert gathered["Adafactor", "fsdp"] == "factor the second moment"
    assert gathered["8 bits", "fsdp"] == "scale blocks of 128 numbers"
    assert gathered["Muon", "fsdp"] == "orthogonalize it"
    assert paths["LAMB", "fsdp"] == "reference: the walk cannot wait for sums over the processes"
    assert paths["per tensor", "fsdp"].startswith("compiled") == (extension is not None)


@every_placement
@pytest.mark.parametrize("name", worker.FUNCTIONS)
def test_functions_on_parameters_do_what_they_do_to_whole_ones(ranks, name, kind):
    expected = worker.called()[name]
    for found in (rank["called"][kind][name] for rank in ranks):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    changed = [t for t, before in zip(expected, worker.values(0, torch.float64), strict=False) if not t.equal(before)]
    assert bool(changed) == name.startswith(("max_norm_", "lookahead_"))
