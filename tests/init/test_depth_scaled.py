# SPDX-License-Identifier: Apache-2.0
"""depth_scaled: the layers it finds, and the variance of the sum of all branches."""

import pytest
import torch
from torch import nn

from lightning_optkit.init import depth_scaled, he, initialize, lecun


def transformer(num_layers):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)


@pytest.mark.parametrize("num_layers", [None, 3])
def test_scales_the_last_projections_and_nothing_else(num_layers):
    model = transformer(3)
    initialize(model, he, generator=torch.Generator().manual_seed(0))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = depth_scaled(model, num_layers=num_layers)
    assert [row.module for row in rows] == [
        f"layers.{i}.{end}" for i in range(3) for end in ("self_attn.out_proj", "linear2")
    ]
    scaled = {f"{row.module}.weight" for row in rows}
    for name, parameter in model.named_parameters():
        expected = before[name] * 6**-0.5 if name in scaled else before[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)
    assert {row.scheme for row in rows} == {"depth_scaled, 1/sqrt(6)"}
    assert rows[0].std == pytest.approx(float(model.layers[0].self_attn.out_proj.weight.detach().std(correction=0)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_proj = nn.Linear(128, 128)

    def forward(self, x):
        return x + self.c_proj(x / x.std())


@pytest.mark.parametrize("depth", [4, 64])
def test_the_residual_stream_grows_by_the_variance_of_one_branch_at_any_depth(depth):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(depth)))
    initialize(model, lecun, generator=generator)
    depth_scaled(model)
    with torch.no_grad():
        y = model(torch.randn(256, 128, generator=generator))
    assert float(y.var()) == pytest.approx(2, rel=0.1)  # 1 of the input + 1 of all branches


def test_names_of_other_families_and_only_in_numbered_blocks():
    names = ["attn.c_proj", "mlp.c_proj", "self_attn.o_proj", "mlp.down_proj", "attn.proj", "mlp.fc2", "output.dense"]
    model = nn.Module()
    model.fc2 = nn.Linear(2, 2)  # not in a block: left alone
    block = nn.Module()
    for name in names:
        parent, _, leaf = name.partition(".")
        if not hasattr(block, parent):
            block.add_module(parent, nn.Module())
        getattr(block, parent).add_module(leaf, nn.Linear(2, 2))
    block.attn.c_attn = nn.Linear(2, 2)
    model.h = nn.ModuleList([block])
    assert sorted(row.module for row in depth_scaled(model)) == sorted(f"h.0.{name}" for name in names)


def test_a_pattern_of_one_s_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert [row.module for row in depth_scaled(model, pattern=r"^1$")] == ["1"]


def test_a_frozen_end_is_left_and_named():
    model = transformer(1)
    model.layers[0].linear2.weight.requires_grad_(False)
    before = model.layers[0].linear2.weight.clone()
    assert depth_scaled(model)[1].scheme == "left as it was: frozen"
    assert torch.equal(model.layers[0].linear2.weight, before)


def test_one_tensor_in_place():
    weight = torch.full((2, 2), 4.0)
    assert depth_scaled(weight, num_layers=8) is weight
    assert torch.equal(weight, torch.ones(2, 2))


def test_rejects_a_tensor_without_the_number_of_layers():
    with pytest.raises(ValueError, match=r"depth_scaled\(num_layers=None\): num_layers must be given with a tensor\."):
        depth_scaled(torch.ones(2, 2))


def test_rejects_zero_layers():
    with pytest.raises(ValueError, match=r"depth_scaled\(num_layers=0\): num_layers must be an integer >= 1\."):
        depth_scaled(torch.ones(2, 2), num_layers=0)


def test_rejects_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match=r"depth_scaled\(pattern='nowhere'\): pattern must match the name of a layer"):
        depth_scaled(transformer(1), pattern="nowhere")


def test_rejects_a_number():
    with pytest.raises(TypeError, match=r"depth_scaled\(target=float\): target must be a torch\.nn\.Module\."):
        depth_scaled(1.0)
