# SPDX-License-Identifier: Apache-2.0
"""What a step computes is measured where it is computed, as functions or as modules."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_optkit.diagnostics.measure.calls import CalledFunctions, CalledLayers


def watched(net, x, loss=None):
    """(functions, layers) after a forward pass, and a backward pass if there is a loss."""
    layers = CalledLayers(dict(net.named_modules()))
    functions = CalledFunctions(layers.inside)
    with functions:
        out = net(x)
        if loss is not None:
            loss(out).backward()
    layers.close()
    return functions, layers


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.__dict__["function"] = function  # not a child

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "closed"),
    [
        (nn.ReLU(), 0.5),
        (F.relu, 0.5),
        (torch.relu, 0.5),
        (torch.Tensor.relu, 0.5),
        (nn.Tanh(), 0.25),
        (torch.sigmoid, 0.25),
    ],
)
def test_closed_units(function, closed):
    x = torch.tensor([[-1.0, -2.0, 0.1, 50.0], [-3.0, -0.1, 0.2, 60.0]])
    net = nn.Sequential(Calls(function))
    functions, _ = watched(net, x)
    (seen,) = functions.seen({})
    assert (seen.closed, seen.samples) == (closed, 2)
    assert seen.layer == "0"


def test_units_of_images_are_channels_and_those_of_four_steps_are_put_together():
    x = torch.full((2, 3, 4, 4), -1.0)
    x[0, 1, 2, 2] = 1.0
    alive = {}
    for _ in range(2):
        (seen,) = watched(nn.ReLU(), x)[0].seen(alive)
    assert (seen.closed, seen.samples) == (pytest.approx(2 / 3), 2 * 32)
    x[1, 0, 0, 0] = 1.0
    (seen,) = watched(nn.ReLU(), x)[0].seen(alive)
    assert seen.closed == pytest.approx(1 / 3)
    for _ in range(4):
        (seen,) = watched(nn.ReLU(), -x.abs())[0].seen(alive)
    assert (seen.closed, seen.closed_since) == (1.0, 1.0)


def test_layers_and_gradients():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    x = torch.randn(64, 4, dtype=torch.float64)
    _, layers = watched(net, x, lambda out: out.square().sum() / 2)
    first, last = layers.layers()
    out = net(x).detach()
    assert (first.name, last.name) == ("0", "1")
    assert first.in_rms == pytest.approx(float(x.square().mean().sqrt()))
    assert last.grad_rms == pytest.approx(float(out.square().mean().sqrt()))
    assert first.grad_rms == pytest.approx(float((out @ net[1].weight.detach()).square().mean().sqrt()))
    assert last.gain == pytest.approx(float(net[1].weight.detach().square().mean().sqrt()) * 2)
    assert not net[0]._forward_hooks and not net[0]._forward_pre_hooks


@pytest.mark.parametrize(
    ("net", "x", "is_seen"),
    [
        (nn.Linear(3, 2), torch.randn(8, 3), True),
        (nn.Conv2d(1, 2, 3), torch.randn(8, 1, 5, 5), True),
        (nn.GRU(3, 2, batch_first=True), torch.randn(8, 4, 3), True),
        (nn.LayerNorm(3), torch.randn(8, 3), False),
        (nn.Embedding(5, 2), torch.arange(5), False),
    ],
)
def test_the_first_input_is_that_of_a_layer_without_a_norm(net, x, is_seen):
    _, layers = watched(nn.Sequential(net), x)
    assert (layers.first_input() is not None) == is_seen


def test_scales_of_features():
    torch.manual_seed(0)
    x = torch.randn(512, 8) * torch.tensor([1.0] * 7 + [300.0])
    x[:, :6] += 50.0
    (seen,) = [watched(nn.Sequential(nn.Linear(8, 1)), x)[1].first_input()]
    assert seen.spread == pytest.approx(300 * 0.65 + 1 * 0.35, rel=0.1)  # between the two largest of eight
    assert seen.offset == pytest.approx(6 / 8) and not seen.is_constant
    (same,) = [watched(nn.Sequential(nn.Linear(8, 1)), x[:1].expand(16, 8))[1].first_input()]
    assert same.is_constant


TARGET = torch.tensor([0, 1, 2, 2])


@pytest.mark.parametrize(
    ("loss", "behind", "constant"),
    [
        (lambda x: F.cross_entropy(x, TARGET), None, 1.0397 + 2 / 8),
        (lambda x: F.cross_entropy(x.softmax(1), TARGET), "softmax", 1.0397 + 2 / 8),
        (lambda x: F.cross_entropy(torch.sigmoid(x), TARGET), "sigmoid", 1.0397 + 2 / 8),
        (lambda x: F.cross_entropy(10 * torch.tanh(x), TARGET), None, 1.0397 + 2 / 8),
        (lambda x: nn.CrossEntropyLoss()(nn.Softmax(1)(x), TARGET), "softmax", 1.0397 + 2 / 8),
        (lambda x: F.cross_entropy(x, TARGET, reduction="sum"), None, 4 * (1.0397 + 2 / 8)),
        (lambda x: F.mse_loss(x[:, :2], TARGET.float()[:, None].expand(4, 2), reduction="sum"), None, 8 * 11 / 12),
        (lambda x: F.cross_entropy(x, TARGET, torch.ones(3)), None, math.nan),
        (lambda x: F.binary_cross_entropy_with_logits(x[:, 0], (TARGET == 0).float()), None, 0.5623),
        (lambda x: F.mse_loss(x[:, 0], TARGET.float()), None, 11 / 12),
        (lambda x: F.l1_loss(F.relu(x[:, 0]), TARGET.float()), "relu", 0.75),
    ],
)
def test_losses(loss, behind, constant):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    functions = CalledFunctions(lambda: "")
    with functions:
        value = loss(x)
    (seen,) = functions.losses
    assert seen.value == pytest.approx(float(value)) and seen.behind == behind
    assert seen.constant == pytest.approx(constant, abs=1e-4, nan_ok=True)


SOFT = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]])


@pytest.mark.parametrize(
    "least",
    [
        lambda: F.cross_entropy(SOFT.log(), SOFT),
        lambda: F.cross_entropy(SOFT.log(), SOFT, reduction="sum"),
        lambda: F.cross_entropy(SOFT.log(), torch.tensor([0, 2]), label_smoothing=0.75),
        lambda: F.binary_cross_entropy(SOFT, SOFT),
        lambda: F.binary_cross_entropy_with_logits(SOFT.logit(), SOFT),
        lambda: F.cross_entropy(100 * torch.eye(3), torch.arange(3)),
        lambda: F.mse_loss(SOFT, SOFT),
    ],
)
def test_no_prediction_comes_below_the_floor(least):
    functions = CalledFunctions(lambda: "")
    with functions:
        value = least()
    assert functions.losses[0].floor == pytest.approx(float(value), abs=1e-6)


def test_a_softmax_in_front_of_a_log_softmax_is_in_front_of_its_loss():
    x = torch.randn(4, 3)
    functions = CalledFunctions(lambda: "")
    with functions:
        F.nll_loss(nn.LogSoftmax(1)(x.softmax(1)), TARGET)
        F.nll_loss(F.log_softmax(x, 1), TARGET)
    assert [seen.behind for seen in functions.losses] == ["softmax", None]


def test_outputs_that_do_not_match():
    x = torch.randn(4, 3)
    functions = CalledFunctions(lambda: "")
    with functions, pytest.warns(UserWarning, match="broadcast"):
        F.nll_loss(x.softmax(1), TARGET)
        F.nll_loss(x.log_softmax(1), TARGET)
        F.cross_entropy(x[:, :1], torch.zeros(4).long())
        F.mse_loss(x[:, :1], TARGET.float())
        F.mse_loss(torch.tanh(x[:, 0]), TARGET.float())
    wrong, right, single, broadcast, bounded = functions.losses
    assert (wrong.is_log, right.is_log, single.classes, broadcast.is_broadcast) == (False, True, 1, True)
    assert bounded.outside == pytest.approx(0.5)


PAIRS = torch.tensor([0.0, 0, 0, 1, 1])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # Of three samples of class 2 two are found, of the two others one.
        (lambda x: F.cross_entropy(x, torch.tensor([2, 2, 2, 0, 1])), (2, 3, 1, 2, 1)),
        (lambda x: F.cross_entropy(x, torch.tensor([2, 2, 2, -100, 1])), (2, 3, 1, 1, 0)),
        (lambda x: F.binary_cross_entropy_with_logits(x[:, 0], PAIRS), (0, 3, 1, 2, 1)),
        (lambda x: F.binary_cross_entropy(x[:, :1].sigmoid(), PAIRS[:, None]), (0, 3, 1, 2, 1)),
        (lambda x: F.binary_cross_entropy_with_logits(x, x.detach().sigmoid()), (-1, 0, 0, 0, 0)),
        (lambda x: F.cross_entropy(x, x.detach().softmax(1)), (-1, 0, 0, 0, 0)),
        (lambda x: F.mse_loss(x, torch.zeros(5, 3)), (-1, 0, 0, 0, 0)),
        (lambda x: F.cross_entropy(x, torch.full((5,), -100)), (-1, 0, 0, 0, 0)),
    ],
)  # fmt: skip
def test_how_the_most_frequent_class_is_predicted_and_how_the_others(loss, expected):
    x = torch.tensor([[-1.0, 0, 1], [1, -1, 0], [-1, 0, 1], [-1, 1, 0], [1, 2, 0]])
    functions = CalledFunctions(lambda: "")
    with functions:
        loss(x)
    (seen,) = functions.losses
    found = (seen.common, seen.num_common, seen.missed_common, seen.num_others, seen.missed_others)
    assert found == expected


def test_the_softmax_of_a_single_column_is_known_by_its_ones():
    functions = CalledFunctions(lambda: "")
    x = torch.randn(4, 2)
    with functions:
        F.binary_cross_entropy(x[:, :1].softmax(1)[:, 0], torch.ones(4))
        F.binary_cross_entropy(x.softmax(1), torch.ones(4, 2))
        F.binary_cross_entropy(torch.ones(4), torch.ones(4))
    assert [seen.is_one for seen in functions.losses] == [True, False, False]


def test_the_classes_of_a_batch_are_known_where_each_sample_has_one():
    functions = CalledFunctions(lambda: "")
    with functions:
        F.cross_entropy(torch.randn(4, 5), torch.tensor([4, 1, 1, 4]))
        F.cross_entropy(torch.randn(2, 5, 2), torch.tensor([[4, 1], [1, 4]]))
        F.binary_cross_entropy_with_logits(torch.randn(3), torch.tensor([1.0, 0.0, 1.0]))
        F.mse_loss(torch.randn(3), torch.randn(3))
    assert [seen.present for seen in functions.losses] == [(1, 4), (), (0, 1), ()]


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_what_is_parametrized_is_not_computed_once_more(part):
    class Counts(nn.Module):
        def forward(self, given):
            computed.append(1)
            return given

    computed, net = [], nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrize.register_parametrization(net[1], part, Counts())
    computed.clear()
    _, layers = watched(net, torch.randn(8, 4), torch.sum)
    first, second = layers.layers()
    assert len(computed) == 1  # by the layer itself
    assert math.isfinite(first.gain) and math.isfinite(first.bias)
    assert math.isnan(second.gain if part == "weight" else second.bias) and second.grad_rms > 0


def test_nothing_is_measured_inside_vmap():
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(8, 4)
    layers = CalledLayers(dict(net.named_modules()))
    functions = CalledFunctions(layers.inside)
    with functions:
        torch.func.vmap(lambda row: F.mse_loss(net(row), row))(x).sum().backward()
    layers.close()
    assert not layers.layers() and layers.first_input() is None and not functions.seen({}) and not functions.losses


def test_a_scripted_module_takes_no_hooks():
    net = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 4))
    _, layers = watched(net, torch.randn(8, 4), torch.sum)
    assert [layer.name for layer in layers.layers()] == ["1"]
