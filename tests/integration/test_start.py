# SPDX-License-Identifier: Apache-2.0
"""Preprocess, Initialize and Augment in two gloo processes, under DDP and FSDP2, against one process."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_optkit.callbacks import Preprocess
from lightning_optkit.data import Impute, RobustScale, Standardize, Whiten
from lightning_optkit.init import he, initialize
from tests.workers import launch, load_worker

WORKER = Path(__file__).with_name("start_worker.py")


worker = load_worker(WORKER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the two processes saved. All cases run in the same two, one after another."""
    folder = tmp_path_factory.mktemp("start")
    launch(WORKER, folder, processes=2, timeout=180)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """ranks[case]: what each process holds after it."""
    return {case: [torch.load(folder / f"{case} {rank}.pt") for rank in range(2)] for case in worker.CASES}


@pytest.fixture(scope="module")
def alone():
    """alone[case]: the same from one process; the sharded cases as plain ones."""
    with torch.random.fork_rng():
        return {case: worker.run(case)[1] for case in worker.CASES if not case.startswith("sharded")}


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("case", worker.CASES)
def test_both_ranks_hold_the_same_bits(ranks, case):
    first, second = ({key: r[key] for key in ("weights", "buffers", "learned")} for r in ranks[case])
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_statistics_of_two_processes_are_those_of_one_and_of_every_row_once(ranks, alone):
    # A triangular factor is unique but for the signs of its rows.
    found, expected = (
        [{key: value for key, value in learned.items() if not key.endswith("factor")} for learned in result["learned"]]
        for result in (ranks["statistics"][0], alone["statistics"])
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    impute = Impute("median").fit(worker.HOLED)
    scale = Standardize().fit(impute(worker.HOLED))
    whiten = Whiten().fit(scale(impute(worker.HOLED)))
    inputs, targets = (callback.transform for callback in worker.CASES["statistics"]())
    inputs.load_state_dict(found[0], strict=False)
    targets.load_state_dict(found[1])
    by_hand = whiten(scale(impute(worker.HOLED)))
    torch.testing.assert_close(inputs(worker.HOLED), by_hand, rtol=1e-12, atol=1e-12)
    assert torch.equal(targets(worker.TARGETS), RobustScale().fit(worker.TARGETS)(worker.TARGETS))
    assert float(inputs[1].stats["count"][0]) == worker.NUM_ROWS


def test_the_checkpoint_of_two_processes_carries_them(folder, ranks):
    saved = torch.load(folder / "statistics.ckpt", weights_only=True)["callbacks"]
    later: Preprocess = worker.CASES["statistics"]()[0]
    later.load_state_dict(saved[later.state_key])
    torch.testing.assert_close(later.state_dict(), ranks["statistics"][0]["learned"][0], rtol=0, atol=0)


def test_every_rank_gets_the_weights_of_the_pure_function(ranks, alone):
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
    initialize(net, he, generator=torch.Generator().manual_seed(3))
    expected = {f"net.{name}": p.detach() for name, p in net.named_parameters()}
    for case in ("he", "sharded he"):
        torch.testing.assert_close(ranks[case][1]["weights"], expected, rtol=0, atol=0)
    torch.testing.assert_close(alone["he"]["weights"], expected, rtol=0, atol=0)


def test_lsuv_gives_every_rank_unit_variance_on_one_batch_sharded_or_not(ranks):
    plain, sharded = (ranks[case][0]["weights"] for case in ("lsuv", "sharded lsuv"))
    torch.testing.assert_close(sharded, plain, rtol=1e-6, atol=1e-6)  # the output scaled, or the weight
    impute = Impute().fit(worker.HOLED)
    x = Standardize().fit(impute(worker.HOLED))(impute(worker.HOLED)).float()[: worker.GLOBAL_BATCH // 2]
    hidden = nn.functional.linear(x, plain["net.0.weight"], plain["net.0.bias"])
    assert abs(float(hidden.var(correction=0)) - 1) < 0.01


def test_augmented_training_of_two_processes_equals_one_with_the_same_batches(ranks):
    """The ranks draw apart; one process that trains on what both saw gets the same weights."""
    first, second = (ranks["augment"][rank]["seen"] for rank in range(2))
    assert len(first) == len(second) == 2
    assert not torch.equal(first[0][0], second[0][0])
    module = worker.Regression(1)
    initialize(module, he, generator=torch.Generator().manual_seed(3))
    optimizer = module.configure_optimizers()
    for (x1, y1), (x2, y2) in zip(first, second, strict=True):
        optimizer.zero_grad()
        predicted = module.net(torch.cat([x1, x2]).float())
        nn.functional.mse_loss(predicted, torch.cat([y1, y2])).backward()
        optimizer.step()
    expected = {name: p.detach() for name, p in module.named_parameters()}
    torch.testing.assert_close(ranks["augment"][0]["weights"], expected, rtol=0, atol=1e-6)
