# SPDX-License-Identifier: Apache-2.0
"""activation_statistics: correct numbers and verdicts, no side effects."""

import functools

import pytest
import torch
from torch import nn

from lightning_optkit.init import ActivationRow, activation_statistics, he, initialize, render_activations


def batch(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def deep(activation, std):
    model = nn.Sequential(*(m for _ in range(30) for m in (nn.Linear(64, 64), activation())))
    initialize(model, functools.partial(nn.init.normal_, std=std), generator=torch.Generator().manual_seed(0))
    return model


def test_mean_and_variance_are_those_of_the_outputs_in_order_of_execution():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    rows = activation_statistics(model, batch(16, 4))
    x = batch(16, 4)
    assert [(row.layer, row.kind) for row in rows] == [("0", "Linear"), ("1", "ReLU"), ("2", "Linear")]
    for layer, row in zip(model, rows, strict=True):
        x = layer(x).detach()
        assert row.mean == pytest.approx(float(x.mean()), abs=1e-6)
        assert row.variance == pytest.approx(float(x.var(correction=0)), rel=1e-5)


@pytest.mark.parametrize(
    ("activation", "std", "verdict"),
    [(nn.ReLU, 0.01, "dies"), (nn.Tanh, 0.01, "dies"), (nn.ReLU, 1.0, "blows up"), (nn.Tanh, 3.0, "saturates")],
)
def test_verdicts_of_networks_drawn_badly(activation, std, verdict):
    rows = activation_statistics(deep(activation, std), batch(64, 64))
    assert rows[-1].verdict == verdict


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_no_verdict_on_a_network_drawn_well(activation):
    model = deep(activation, 1.0)
    initialize(model, he, generator=torch.Generator().manual_seed(0))
    assert {row.verdict for row in activation_statistics(model, batch(64, 64))} == {""}


def test_a_nan_blows_up():
    assert activation_statistics(nn.Linear(4, 4), torch.full((2, 4), float("nan")))[0].verdict == "blows up"


@pytest.mark.parametrize(("scale", "verdict"), [(1.0, ""), (50.0, "saturates")])
def test_a_sigmoid_saturates_at_both_ends(scale, verdict):
    assert activation_statistics(nn.Sigmoid(), scale * batch(64, 8))[0].verdict == verdict


def test_a_softmax_over_many_classes_does_not_die():
    assert activation_statistics(nn.Softmax(dim=1), batch(8, 1000))[0].verdict == ""


def test_modes_buffers_hooks_random_state_and_graph_are_left_as_they_were():
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.InstanceNorm1d(8, track_running_stats=True)
    )
    model[1].eval()
    modes = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    needs_grad = []

    def forward(model, x):
        y = model[2](model[1](model[0](x)))
        needs_grad.append(y.requires_grad)
        model[3](y[:, :, None].expand(-1, -1, 2))
        torch.rand(1)

    activation_statistics(model, batch(16, 4), forward=forward)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())
    assert needs_grad == [False]


def test_a_buffer_that_a_forward_replaces_is_put_back():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count = self.count + 1
            return x

    model = Counter()
    buffer = model.count
    activation_statistics(model, batch(2, 2))
    assert model.count is buffer and model.count == 0


def test_batch_norm_shows_what_it_does_in_training_and_dropout_is_off():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.9), nn.Identity(), nn.Threshold(-100.0, 0.0)).eval()
    rows = activation_statistics(model, 100 * batch(64, 4) + 7)
    assert [row.kind for row in rows] == ["BatchNorm1d", "Threshold"]  # what only hands its input on has no row
    assert rows[0].variance == pytest.approx(1, rel=0.01)
    assert rows[1].variance == rows[0].variance


def test_attention_and_recurrent_layers_have_rows_and_a_shared_module_one_per_call():
    act = nn.ReLU()
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "rnn": nn.LSTM(8, 8), "act": act})

    def forward(model, x):
        y = model["act"](model["attn"](x, x, x)[0])
        model["act"](model["rnn"](y)[0])

    rows = activation_statistics(model, batch(3, 2, 8), forward=forward)
    assert [(row.layer, row.call) for row in rows] == [("attn", 0), ("act", 0), ("rnn", 0), ("act", 1)]


def test_the_table_shows_before_and_after_side_by_side():
    before = [ActivationRow("0", "Linear", 0, 0.5, 1e-9, "dies"), ActivationRow("1", "ReLU", 1, 0.0, 1.0, "")]
    after = [ActivationRow("0", "Linear", 0, 0.25, 2.0, "")]
    lines = render_activations(before, after).splitlines()
    assert lines[0].split() == ["layer", "kind", *(f"{what}" for when in ("before", "after")
                                for word in ("mean", "variance", "verdict") for what in (word, when))]  # fmt: skip
    assert lines[2].split() == ["0", "Linear", "0.5", "1e-09", "dies", "0.25", "2"]
    assert lines[3].split() == ["1", "#2", "ReLU", "0", "1"]


def test_rejects_what_is_not_a_module():
    with pytest.raises(TypeError, match=r"activation_statistics\(model=str\): model must be a torch\.nn\.Module\."):
        activation_statistics("model", batch(2, 2))


def test_sync_batch_norm_does_not_wait_for_other_ranks():
    model = nn.SyncBatchNorm(4)  # with its running statistics, here 0 and 1, it needs no one else
    rows = activation_statistics(model, 10 * batch(64, 4))
    assert model.training and rows[0].variance == pytest.approx(100, rel=0.2)
