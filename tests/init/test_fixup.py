# SPDX-License-Identifier: Apache-2.0
"""fixup against the formula of the paper, and its purpose: deep residual networks without norms."""

import pytest
import torch
from torch import nn

from lightning_optkit.init import fixup, he, initialize


class Block(nn.Module):
    def __init__(self, width, num_layers, shortcut=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))
        self.shortcut = nn.Linear(width, width) if shortcut else nn.Identity()

    def forward(self, x):
        y = x
        for layer in self.layers[:-1]:
            y = torch.relu(layer(y))
        return self.shortcut(x) + self.layers[-1](y)


def network(num_blocks, num_layers, width=16):
    blocks = (Block(width, num_layers, shortcut=i == 0) for i in range(num_blocks))
    return nn.Sequential(nn.Linear(8, width), nn.Sequential(*blocks), nn.Linear(width, 3))


@pytest.mark.parametrize(("num_blocks", "num_layers"), [(4, 2), (9, 3)])
def test_equals_the_formula(num_blocks, num_layers):
    model, reference = network(num_blocks, num_layers), network(num_blocks, num_layers)
    fixup(model, generator=torch.Generator().manual_seed(0))
    initialize(reference, he, generator=torch.Generator().manual_seed(0))

    factor = num_blocks ** (-1 / (2 * num_layers - 2))
    for name, weight in model.named_parameters():
        drawn = reference.get_parameter(name).detach()
        if name.endswith("bias") or name == "2.weight" or name.endswith(f"layers.{num_layers - 1}.weight"):
            expected = torch.zeros_like(drawn)
        elif ".layers." in name:
            expected = drawn * factor
        else:  # the first layer and the shortcut
            expected = drawn
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=0, msg=name)


def test_rows_tell_each_parameter_what_became_of_it():
    rows = {f"{row.module}.{row.parameter}": row for row in fixup(network(4, 2))}
    assert rows["0.weight"].scheme == "he"
    assert rows["1.0.layers.0.weight"].scheme == "he x 4^(-1/2)"
    assert rows["1.0.layers.1.weight"].scheme == "zero (end of branch)"
    assert rows["1.0.shortcut.weight"].scheme == "he"
    assert rows["2.weight"].scheme == "zero (head)"
    assert rows["2.weight"].std == 0


def change_of_the_output_in_one_step(num_blocks, draw):
    model = network(num_blocks, 2, width=64)
    draw(model, torch.Generator().manual_seed(0))
    nn.init.normal_(model[2].weight, std=0.1, generator=torch.Generator().manual_seed(1))
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
    before = model(x)
    before[:, 0].mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-4 * parameter.grad
        return float((model(x) - before)[:, 0].mean().abs())


def test_one_step_of_sgd_changes_a_deep_network_no_more_than_a_shallow_one():
    """The paper's design goal: the change of the output in one step is Theta(lr), whatever the depth."""

    def by_he(model, generator):
        initialize(model, he, generator=generator)

    def by_fixup(model, generator):
        fixup(model, generator=generator)

    grown = {
        draw: change_of_the_output_in_one_step(16, draw) / change_of_the_output_in_one_step(4, draw)
        for draw in (by_he, by_fixup)
    }
    assert grown[by_fixup] < 4
    assert grown[by_he] > 1000


def test_branches_and_head_of_one_s_own():
    model = nn.ModuleDict({"attn": Block(4, 2), "mlp": Block(4, 3), "head": nn.Linear(4, 2), "other": nn.Linear(4, 2)})
    rows = {f"{row.module}.{row.parameter}": row.scheme for row in fixup(model, branches="^(attn|mlp)$", head="head")}
    assert rows["attn.layers.0.weight"] == "he x 2^(-1/2)"
    assert rows["mlp.layers.1.weight"] == "he x 2^(-1/4)"
    assert rows["head.weight"] == "zero (head)"
    assert rows["other.weight"] == "he"


def test_a_shortcut_at_the_very_end_is_not_taken_for_a_head():
    model = nn.Sequential(Block(4, 2), Block(4, 2, shortcut=True))
    fixup(model)
    assert model[1].shortcut.weight.any()


def test_rejects_a_model_with_norms():
    with pytest.raises(ValueError, match=r"fixup\(model with the norm '1'\): model must have no normalization layers"):
        fixup(nn.Sequential(Block(4, 2), nn.LayerNorm(4)))


def test_rejects_a_model_without_branches():
    with pytest.raises(ValueError, match=r"fixup\(branches=None\): branches must match the modules that are residual"):
        fixup(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))


def test_rejects_an_unknown_head():
    with pytest.raises(ValueError, match=r"fixup\(head='fc'\): head must be the name of a layer of the model\."):
        fixup(network(2, 2), head="fc")


def test_rejects_what_is_not_a_module():
    with pytest.raises(TypeError, match=r"fixup\(model=int\): model must be a torch\.nn\.Module\."):
        fixup(3)
