# SPDX-License-Identifier: Apache-2.0
"""mup_width against Table 3 of the paper, and what it is for: updates of the same size at every width."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_optkit.init import MupRow, he, initialize, mup_parameter_groups, mup_width


class Net(nn.Module):
    """A bit of everything that grows with the width."""

    def __init__(self, width):
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.position = nn.Parameter(torch.zeros(5, width))
        self.rnn = nn.GRU(width, width)
        self.conv = nn.Conv1d(width, 2 * width, 3, groups=2)
        self.depthwise = nn.Conv1d(2 * width, 2 * width, 3, groups=2 * width)
        self.up = nn.ConvTranspose1d(2 * width, 7, 3)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2)
        self.fixed = nn.Linear(3, 4)
        self.head = nn.Linear(width, 11)


TABLE_3 = {  # name: (kind, Adam, SGD) at four times the width
    "table.weight": ("input", 1, 4),
    "position": ("input", 1, 4),
    "rnn.weight_ih_l0": ("hidden", 1 / 4, 1),
    "rnn.weight_hh_l0": ("hidden", 1 / 4, 1),
    "rnn.bias_ih_l0": ("input", 1, 4),
    "conv.weight": ("hidden", 1 / 4, 1),
    "depthwise.weight": ("input", 1, 4),
    "up.weight": ("output", 1 / 4, 1 / 4),
    "up.bias": ("fixed", 1, 1),
    "norm.weight": ("input", 1, 4),
    "attention.in_proj_weight": ("hidden", 1 / 4, 1),
    "attention.out_proj.weight": ("hidden", 1 / 4, 1),
    "fixed.weight": ("fixed", 1, 1),
    "head.weight": ("output", 1 / 4, 1 / 4),
    "head.bias": ("fixed", 1, 1),
}


def named(rows):
    return {f"{row.module}.{row.parameter}".lstrip("."): row for row in rows}


def test_kinds_and_multipliers_are_those_of_table_3():
    rows = named(mup_width(Net(32), Net(8)))
    assert all(isinstance(row, MupRow) for row in rows.values())
    assert {name: (rows[name].kind, rows[name].adam, rows[name].sgd) for name in TABLE_3} == TABLE_3


def test_output_weights_shrink_and_all_others_are_he_s():
    model, reference = Net(32), Net(32)
    rows = named(mup_width(model, Net(8), generator=torch.Generator().manual_seed(0)))
    initialize(reference, he, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        factor = 0.5 if rows[name].kind == "output" else 1.0
        if name != "position":
            assert torch.equal(parameter, reference.get_parameter(name) * factor), name
            assert rows[name].std == pytest.approx(float(parameter.detach().std(correction=0)), abs=1e-7)


def test_at_the_base_width_nothing_changes():
    model, reference = Net(8), Net(8)
    rows = mup_width(model, Net(8), generator=torch.Generator().manual_seed(0))
    initialize(reference, he, generator=torch.Generator().manual_seed(0))
    assert {(row.adam, row.sgd) for row in rows} == {(1, 1)}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_the_base_may_live_on_the_meta_device():
    with torch.device("meta"):
        base = Net(8)
    assert named(mup_width(Net(32), base))["head.weight"].adam == 1 / 4


def mlp(width):
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def change_of_the_logits(width, *, rule, mup):
    """Root mean square change of the logits in four full-batch steps, mean of three seeds."""
    changes = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        model = mlp(width)
        lr = 0.01 if rule == "adam" else 0.02
        if mup:
            rows = mup_width(model, mlp(64), generator=generator)
            groups = mup_parameter_groups(model, rows, lr=lr, rule=rule)
        else:
            initialize(model, he, generator=generator)
            groups = [{"params": list(model.parameters()), "lr": lr}]
        optimizer = torch.optim.Adam(groups) if rule == "adam" else torch.optim.SGD(groups)
        x = torch.randn(64, 16, generator=generator)
        target = torch.randint(4, (64,), generator=generator)
        before = model(x).detach()
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
        changes.append(float((model(x).detach() - before).square().mean().sqrt()))
    return sum(changes) / len(changes)


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_updates_have_the_same_size_at_every_width(rule):
    # The theory is one of large widths: at 64 the random output layer still adds to the gradients.
    grown, plain = (
        change_of_the_logits(2048, rule=rule, mup=mup) / change_of_the_logits(256, rule=rule, mup=mup)
        for mup in (True, False)
    )
    assert 0.67 < grown < 1.5
    assert plain > 3


def two_widths(first, second):
    return nn.Sequential(nn.Linear(6, first), nn.Tanh(), nn.Linear(first, second), nn.Tanh(), nn.Linear(second, 3))


@pytest.mark.parametrize(("first", "second"), [(48, 4), (4, 48), (20, 12), (12, 20), (48, 5)])
def test_sgd_rates_of_a_hidden_weight_whose_fans_grow_unequally(first, second):
    # Factors of the authors' package `mup` 1.0 (MuSGD, with MuReadout) for these widths over a base of 4.
    rows = named(mup_width(two_widths(first, second), two_widths(4, 4), draw=False))
    r1, r2 = first / 4, second / 4
    assert rows["2.weight"].sgd == pytest.approx(r2 / r1)
    assert rows["2.weight"].adam == pytest.approx(1 / r1)
    assert (rows["0.weight"].sgd, rows["2.bias"].sgd, rows["4.weight"].sgd) == pytest.approx((r1, r2, 1 / r2))


def test_sgd_rates_of_convolutions_and_blocks_of_gates_whose_fans_grow_unequally():
    def model(narrow, wide):
        return nn.ModuleDict(
            {
                "conv": nn.Conv2d(narrow, wide, 3),
                "transposed": nn.ConvTranspose1d(narrow, wide, 5),
                "rnn": nn.LSTM(narrow, wide),
            }
        )

    rows = named(mup_width(model(16, 24), model(4, 12), draw=False))
    for name in ("conv.weight", "transposed.weight", "rnn.weight_ih_l0"):
        assert (rows[name].sgd, rows[name].adam) == pytest.approx((2 / 4, 1 / 4)), name
    assert (rows["rnn.weight_hh_l0"].sgd, rows["rnn.weight_hh_l0"].adam) == pytest.approx((1, 1 / 2))


def change_by_the_hidden_weight(first, second):
    """Root mean square change of the hidden pre-activations by one SGD step of their own weight, mean of 16 seeds."""
    base, changes = two_widths(64, 64), []
    for seed in range(16):
        generator = torch.Generator().manual_seed(seed)
        model = two_widths(first, second)
        hidden = next(
            r for r in mup_width(model, base, generator=generator) if (r.module, r.parameter) == ("2", "weight")
        )
        x = torch.randn(32, 6, generator=generator)
        F.cross_entropy(model(x), torch.randint(3, (32,), generator=generator)).backward()
        with torch.no_grad():
            changes.append(float((model[:2](x) @ model[2].weight.grad.T).square().mean().sqrt()) * hidden.sgd)
    return sum(changes) / len(changes)


def test_one_sgd_step_changes_the_features_by_the_same_amount_however_the_fans_grow():
    base = change_by_the_hidden_weight(64, 64)
    for first, second in ((1024, 128), (128, 1024), (1024, 64 + 1)):
        assert 0.8 < change_by_the_hidden_weight(first, second) / base < 1.25, (first, second)


@pytest.mark.parametrize(("rule", "rates"), [("adam", {0.1, 0.025}), ("sgd", {0.1, 0.4, 0.025})])
def test_groups_hold_every_trainable_parameter_once_at_its_rate(rule, rates):
    model = Net(32)
    model.fixed.weight.requires_grad_(False)
    rows = mup_width(model, Net(8))
    groups = mup_parameter_groups(model, rows, lr=0.1, rule=rule)
    held = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, held)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {group["lr"] for group in groups} == rates
    rate_of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for row in rows:
        parameter = model.get_submodule(row.module).get_parameter(row.parameter)
        if parameter.requires_grad:
            assert rate_of[id(parameter)] == 0.1 * getattr(row, rule)


def test_rejects_tied_input_and_output_weights():
    def tied(width):
        model = nn.ModuleDict({"wte": nn.Embedding(9, width), "head": nn.Linear(width, 9, bias=False)})
        model["head"].weight = model["wte"].weight
        return model

    with pytest.raises(
        ValueError, match=r"mup_width\(model with wte\.weight and head\.weight tied\): model must have it"
    ):
        mup_width(tied(16), tied(4))


def test_rejects_a_base_of_another_kind():
    with pytest.raises(
        ValueError, match=r"mup_width\(base\): base must have a parameter '2\.weight' with 2 dimensions\."
    ):
        mup_width(mlp(16), nn.Sequential(nn.Linear(16, 4)))


def test_rejects_an_unknown_parameter_that_grows_twice():
    def own(width):
        module = nn.Module()
        module.matrix = nn.Parameter(torch.zeros(width, width))
        return module

    with pytest.raises(
        ValueError, match=r"mup_width\(model with 'matrix'\): a parameter of Module, .* must not grow in"
    ):
        mup_width(own(8), own(4))


def test_rejects_a_base_that_is_no_module():
    with pytest.raises(TypeError, match=r"mup_width\(base=int\): base must be a torch\.nn\.Module\."):
        mup_width(mlp(16), 64)


def test_rejects_an_unknown_rule():
    with pytest.raises(ValueError, match=r"mup_parameter_groups\(rule='lion'\): rule must be one of 'adam', 'sgd'\."):
        mup_parameter_groups(mlp(16), [], lr=0.1, rule="lion")


def test_rejects_a_rate_of_zero():
    with pytest.raises(ValueError, match=r"mup_parameter_groups\(lr=0\): lr must be in \(0, inf\)\."):
        mup_parameter_groups(mlp(16), [], lr=0)
