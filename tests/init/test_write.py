# SPDX-License-Identifier: Apache-2.0
"""Parameters that initialize writes: tied, frozen, parametrized, meta, low-precision and sharded."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lightning_optkit.init import he, initialize, orthogonal

WORKER = Path(__file__).with_name("sharded_worker.py")


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def by_name(rows):
    return {f"{row.module}.{row.parameter}".lstrip("."): row for row in rows}


def zoo():
    return nn.Sequential(nn.Embedding(9, 8), nn.LSTM(8, 8), nn.Conv1d(8, 8, 3, groups=2), nn.ReLU(), nn.Linear(8, 2))


class LanguageModel(nn.Module):
    def __init__(self, *, head_first):
        super().__init__()
        if head_first:
            self.head = nn.Linear(64, 500, bias=False)
        self.table = nn.Embedding(500, 64, padding_idx=0)
        if not head_first:
            self.head = nn.Linear(64, 500, bias=False)
        self.head.weight = self.table.weight


@pytest.mark.parametrize("head_first", [False, True])
def test_a_tied_weight_is_drawn_once_as_a_table_for_unit_logits(head_first):
    model = LanguageModel(head_first=head_first)
    rows = by_name(initialize(model, he, generator=seeded()))
    assert model.head.weight is model.table.weight
    assert rows["head.weight"].scheme == "tied to table.weight"
    assert torch.equal(model.table.weight[0], torch.zeros(64))
    assert model.table.weight[1:].detach().std() == pytest.approx(1 / 8, rel=0.02)
    expected = nn.init.normal_(torch.empty(500, 64), std=1 / 8, generator=seeded())
    assert torch.equal(model.table.weight[1:], expected[1:])


def test_frozen_and_unknown_parameters_are_left_and_named():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((3,), 2.0))
            self.frozen = nn.Linear(3, 3).requires_grad_(False)

    model = Own()
    weight = model.frozen.weight.clone()
    rows = by_name(initialize(model, he))
    assert rows["scale"].scheme == "left as it was: no rule for Own"
    assert rows["frozen.weight"].scheme == "left as it was: frozen"
    assert torch.equal(model.scale, torch.full((3,), 2.0))
    assert torch.equal(model.frozen.weight, weight)


@pytest.mark.parametrize("kind", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrized_weight_goes_through_its_parametrization(kind):
    layer = kind(nn.Linear(6, 4))
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    rows = by_name(initialize(layer, he, generator=seeded()))
    drawn = nn.init.kaiming_normal_(torch.empty(4, 6), nonlinearity="relu", generator=seeded())
    follows = kind is parametrizations.spectral_norm  # what it goes by would be the norm of the weight before
    assert all(follows != torch.equal(buffer, buffers[name]) for name, buffer in layer.named_buffers())
    assert set(rows) == {"weight", "bias"}
    weight = layer.eval().weight.detach()
    scale = float(weight[0, 0] / drawn[0, 0])  # the spectral norm divides by an estimate of the largest gain
    torch.testing.assert_close(weight, drawn * scale)
    assert kind is parametrizations.spectral_norm or scale == pytest.approx(1)


def test_a_parametrization_that_cannot_be_inverted_is_left_and_named():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Doubled())
    before = layer.weight.clone()
    rows = by_name(initialize(layer, he))
    assert rows["weight"].scheme == "left as it was: its parametrization has no right_inverse"
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("scheme", [he, orthogonal])
def test_other_dtypes_stay_what_they_are(scheme, dtype):
    model = zoo().to(dtype)
    initialize(model, scheme, generator=seeded())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_rejects_the_meta_device_before_anything_is_drawn():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    weight = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"initialize\(model with '1.weight' on the meta device\): .*to_empty"):
        initialize(model, he)
    assert torch.equal(model[0].weight, weight)


def test_a_meta_model_can_be_initialized_once_it_has_storage():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model.to_empty(device="cpu")
    initialize(model, he, generator=seeded())
    usual = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    initialize(usual, he, generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), usual.parameters(), strict=True))


def test_rejects_a_lazy_module():
    with pytest.raises(
        ValueError, match=r"initialize\(model with lazy parameter 'weight'\): run one forward pass first"
    ):
        initialize(nn.LazyLinear(3), he)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank of a two-process FSDP2 run of sharded_worker.py saved."""
    folder = tmp_path_factory.mktemp("sharded")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    outputs = [folder / f"{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen([sys.executable, WORKER, str(rank), "2", folder / "rendezvous", output], env=environment)
        for rank, output in enumerate(outputs)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(output, weights_only=False) for output in outputs]


def worker():
    spec = importlib.util.spec_from_file_location("sharded_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_ranks_hold_the_shards_of_what_one_process_draws(ranks):
    for name, net, rows in worker().cases(None, seed=0):
        expected = {key: value.clone() for key, value in net.state_dict().items()}
        for result in ranks:
            values, sharded_rows = result[name]
            assert values.keys() == expected.keys()
            assert all(torch.equal(values[key], expected[key]) for key in expected), name
            assert [(row.module, row.parameter, row.scheme, row.shape) for row in sharded_rows] == [
                (row.module, row.parameter, row.scheme, row.shape) for row in rows
            ]
            assert [row.std for row in sharded_rows] == pytest.approx([row.std for row in rows], rel=1e-6)
    assert all(result["global state untouched"] for result in ranks)
    assert ranks[0]["shards"]["0.weight"] == (3, 6) and ranks[1]["shards"]["0.weight"] == (2, 6)  # really sharded


def test_ranks_with_different_seeds_are_refused_on_every_rank(ranks):
    for result in ranks:
        assert (
            "its state must be the same on every rank of a sharded model; pass generator=" in result["different seeds"]
        )


def test_a_sharded_tensor_says_what_to_do(ranks):
    for result in ranks:
        assert "tensor must be whole; use initialize(model, he)" in result["tensor"]


def test_lsuv_scales_a_sharded_model_as_a_whole_one(ranks):
    for result in ranks:
        (whole, whole_rows), (split, split_rows) = result["lsuv"]
        torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)
        strip = [(row.module, row.parameter, row.scheme) for row in split_rows]
        assert strip == [(row.module, row.parameter, row.scheme) for row in whole_rows] and len(strip) == 4


def test_mup_uses_the_global_shape_of_a_sharded_model(ranks):
    rows = {(row.module, row.parameter): row for row in ranks[0]["mup"]}
    assert rows["0", "weight"].kind == "input" and rows["0", "weight"].sgd == 9 / 4
    assert rows["1", "weight"].kind == "output" and rows["1", "weight"].adam == pytest.approx(4 / 9)
