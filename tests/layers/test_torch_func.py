# SPDX-License-Identifier: Apache-2.0
"""Every layer under the transforms of torch.func, against autograd and against torch's own layers."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import lightning_optkit as ok

WIDTH = 8


class Block(nn.Module):
    """A linear layer, then a norm of the sum with what came in."""

    def __init__(self, norm):
        super().__init__()
        self.line, self.norm = nn.Linear(WIDTH, WIDTH), norm

    def forward(self, x):
        return self.norm(self.line(x), x)[0]


def after_a_line(layer):
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), layer)


class OnImages(nn.Module):
    """Rows as images of 1 x 2 x 4."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.reshape(-1, 1, 2, 4)).flatten(1)


CERTAIN = {
    "LayerNorm": lambda: after_a_line(ok.LayerNorm(WIDTH)),
    "RMSNorm": lambda: after_a_line(ok.RMSNorm(WIDTH)),
    "ScaleNorm": lambda: after_a_line(ok.ScaleNorm(WIDTH)),
    "AddLayerNorm": lambda: Block(ok.AddLayerNorm(WIDTH)),
    "AddRMSNorm": lambda: Block(ok.AddRMSNorm(WIDTH)),
    "WeightStandardizedConv2d": lambda: OnImages(ok.WeightStandardizedConv2d(1, 2, (2, 3), padding=1)),
    "all dropped": lambda: Block(ok.AddLayerNorm(WIDTH, dropout=1.0)),
    "DropConnect, evaluated": lambda: ok.DropConnect(nn.Linear(WIDTH, WIDTH)).eval(),
    "DropConnect of all": lambda: ok.DropConnect(nn.Linear(WIDTH, WIDTH), p=1.0),
    "DropPath, evaluated": lambda: after_a_line(ok.DropPath(0.5)).eval(),
}
RANDOM = {
    "AddLayerNorm": lambda: Block(ok.AddLayerNorm(WIDTH, dropout=0.5)),
    "AddRMSNorm": lambda: Block(ok.AddRMSNorm(WIDTH, dropout=0.5)),
    "DropConnect": lambda: ok.DropConnect(nn.Linear(WIDTH, WIDTH), p=0.5),
    "DropConnect inside": lambda: ok.DropConnect(after_a_line(nn.Tanh()), weights=["0.weight"], p=0.5),
    "DropPath": lambda: after_a_line(ok.DropPath(0.5)),
    "DropBlock2d": lambda: OnImages(ok.DropBlock2d(0.5, block_size=1)),
    "LockedDropout": lambda: after_a_line(ok.LockedDropout(0.5, batch_first=True)),
}


def made(make):
    torch.manual_seed(0)
    net = make().double()
    weights = {name: value.detach() for name, value in net.named_parameters()}
    return net, weights, torch.randn(6, WIDTH, dtype=torch.float64)


def loss_of(net):
    return lambda weights, row: functional_call(net, weights, (row[None],)).square().sum() / 7


@pytest.mark.parametrize("make", CERTAIN.values(), ids=CERTAIN)
def test_gradients_per_row_are_those_of_autograd(make):
    net, weights, x = made(make)
    per_row = vmap(grad(loss_of(net)), (None, 0), randomness="different")(weights, x)
    for index, row in enumerate(x):
        expected = torch.autograd.grad(net(row[None]).square().sum() / 7, [*net.parameters()], allow_unused=True)
        for name, value in zip(weights, expected, strict=True):
            torch.testing.assert_close(
                per_row[name][index], torch.zeros_like(weights[name]) if value is None else value
            )


@pytest.mark.parametrize("make", CERTAIN.values(), ids=CERTAIN)
def test_derivatives_forward_backward_and_second_are_those_of_autograd(make):
    net, weights, x = made(make)
    row, name = x[0], next(iter(weights))

    def of(weight):
        return functional_call(net, {**weights, name: weight}, (row[None],)).square().sum() / 7

    expected = torch.autograd.functional.jacobian(of, weights[name])
    torch.testing.assert_close(jacrev(of)(weights[name]), expected)
    torch.testing.assert_close(jacfwd(of, randomness="same")(weights[name]), expected)
    torch.testing.assert_close(jvp(of, (weights[name],), (torch.ones_like(weights[name]),))[1], expected.sum())
    twice = torch.autograd.functional.hessian(of, weights[name])
    torch.testing.assert_close(hessian(of)(weights[name]), twice)


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM)
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_what_is_dropped_is_drawn_as_vmap_is_told(make, randomness):
    net, weights, x = made(make)
    rows = x[:1].expand(16, WIDTH).clone()  # equal rows: whatever differs was drawn
    found = vmap(lambda row: functional_call(net, weights, (row[None],)), randomness=randomness)(rows)
    alike = all(torch.equal(found[0], other) for other in found)
    assert found.isfinite().all() and alike == (randomness == "same")
    gradients = vmap(grad(loss_of(net)), (None, 0), randomness=randomness)(weights, rows)
    for value in gradients.values():
        assert value.isfinite().all()
        if randomness == "same":
            torch.testing.assert_close(value, value[:1].expand_as(value))


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM)
def test_a_draw_is_refused_where_vmap_allows_none(make):
    net, weights, x = made(make)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda row: functional_call(net, weights, (row[None],)))(x)


@pytest.mark.parametrize("norm", [ok.AddLayerNorm, ok.AddRMSNorm])
def test_dropout_under_vmap_zeroes_or_scales_up_and_the_norm_follows(norm):
    torch.manual_seed(0)
    layer, x = norm(WIDTH, dropout=0.25), torch.randn(64, 1, WIDTH)
    y, total = vmap(lambda row: layer(row, torch.zeros_like(row)), randomness="different")(x)
    kept = total != 0
    torch.testing.assert_close(total[kept], (x / 0.75)[kept])
    assert 0.6 < kept.double().mean() < 0.9
    torch.testing.assert_close(y, layer.eval()(total, torch.zeros_like(total))[0])


def test_weights_handed_to_a_drop_connect_are_those_that_it_drops():
    net, given = ok.DropConnect(nn.Linear(WIDTH, WIDTH, bias=False), p=0.5), torch.ones(WIDTH, WIDTH)
    y = functional_call(net, {"module.weight": given}, (torch.eye(WIDTH),))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    own = net.module.weight
    with torch.no_grad():
        own.fill_(3.0)
    assert set(net(torch.eye(WIDTH)).unique().tolist()) == {0.0, 6.0} and net.module.weight is own
