# SPDX-License-Identifier: Apache-2.0
"""Two gloo processes against one. Run as a script, this file is one of the two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits, load_wine
from torch import nn

from lightning_optkit.data import (
    Impute,
    MinMaxScale,
    OneHot,
    RobustScale,
    Standardize,
    Vocabulary,
    Whiten,
    fit_in_order,
    merge_across_ranks,
)

NAMES = ["Standardize", "MinMaxScale", "RobustScale", "Impute mean", "Impute median", "Impute mode", "OneHot", "Whiten"]
TEXTS = ["a b b", "c", "b d", "d d d", "a"]


def make(name):
    if name.startswith("Impute"):
        return Impute(
            {"mean": "mean", "median": "median", "mode": "most_frequent"}[name.split()[1]], add_indicator=True
        )
    return {c.__name__: c for c in (Standardize, MinMaxScale, RobustScale, OneHot, Whiten)}[name]()


def table(name):
    if name == "OneHot":
        return torch.tensor(load_digits().data)[:, :20]
    rows = torch.tensor(load_wine().data) + (1e9 if name == "Standardize" else 0)
    holes = torch.rand(rows.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    return rows if name == "Whiten" else rows.masked_fill(holes, torch.nan)


def chain():
    return nn.Sequential(Impute("median"), Standardize(), Whiten())


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for name in NAMES:
        rows = table(name)
        mine = rows[: len(rows) // 3] if rank == 0 else rows[len(rows) // 3 :]
        results[name] = make(name).fit(mine.split(10), across_ranks=True).state_dict()
    results["chain"] = fit_in_order(chain(), table("Impute median")[rank::2].split(10), across_ranks=True).state_dict()
    results["Vocabulary"] = Vocabulary().fit(TEXTS[rank::2], across_ranks=True).state_dict()
    lone = Standardize()
    if rank == 1:
        lone.partial_fit(table("Standardize"))
    results["one rank without data"] = merge_across_ranks(lone).finalize().state_dict()
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one(ranks, name):
    whole, both = make(name).fit(table(name)), make(name)
    both.load_state_dict(ranks[0][name])
    x = table(name)
    torch.testing.assert_close(both(x), whole(x), rtol=1e-12, atol=1e-12, equal_nan=True)


def test_a_chain_fitted_by_two_processes_equals_one(ranks):
    x, both = table("Impute median"), chain()
    whole = fit_in_order(chain(), [x])
    both.load_state_dict(ranks[0]["chain"])
    torch.testing.assert_close(both(x), whole(x), rtol=1e-12, atol=1e-12)


def test_vocabularies_are_merged(ranks):
    assert ranks[1]["Vocabulary"]["_extra_state"] == Vocabulary().fit(TEXTS).state_dict()["_extra_state"]


def test_a_rank_without_data_gets_what_the_other_learned(ranks):
    expected = Standardize().fit(table("Standardize")).state_dict()
    for state in ranks:
        torch.testing.assert_close(state["one rank without data"], dict(expected), rtol=0, atol=0)


def test_all_ranks_end_with_the_same_bits(ranks):
    for name in NAMES:
        for key, value in ranks[0][name].items():
            assert torch.equal(value, ranks[1][name][key]), (name, key)


def test_without_a_process_group_nothing_happens():
    scale = Standardize().partial_fit(torch.tensor([[1.0], [3.0]]))
    assert merge_across_ranks(scale) is scale and scale.finalize().mean.item() == 2


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
