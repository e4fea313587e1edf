# SPDX-License-Identifier: Apache-2.0
"""DropConnect: named weights are dropped, in recurrent and parametrized layers too, and come back."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout
from torch.nn.utils import parametrizations

from lightning_optkit.layers import DropConnect


def test_a_linear_layer_uses_the_dropped_weight_and_keeps_its_own():
    layer, x = DropConnect(nn.Linear(40, 30), p=0.3), torch.randn(2, 40)
    weight = layer.module.weight.detach().clone()
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    torch.testing.assert_close(y, nn.functional.linear(x, dropout(weight, 0.3), layer.module.bias))
    assert torch.equal(layer.module.weight, weight) and list(layer.state_dict()) == ["module.weight", "module.bias"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_share_a_mask_over_time(kind):
    rnn = kind(3, 5)
    layer, x = DropConnect(rnn, ["weight_hh_l0"], p=0.5), torch.randn(7, 2, 3)
    plain = kind(3, 5)
    plain.load_state_dict(rnn.state_dict())
    torch.manual_seed(0)
    y = layer(x)[0]
    torch.manual_seed(0)
    plain.weight_hh_l0.data = dropout(plain.weight_hh_l0.data, 0.5)
    expected = plain(x)[0]
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    kept = plain.weight_hh_l0 != 0
    torch.testing.assert_close(rnn.weight_hh_l0.grad, torch.where(kept, plain.weight_hh_l0.grad * 2, 0.0))
    assert rnn._flat_weights[1] is rnn.weight_hh_l0


def test_names_reach_into_children():
    model = nn.ModuleDict({"rnn": nn.GRU(3, 4)})
    model.forward = lambda x: model["rnn"](x)[0]
    layer, x = DropConnect(model, "rnn.weight_hh_l0", p=1.0), torch.randn(5, 1, 3)
    model["rnn"].weight_hh_l0.data.fill_(9.0)
    y = layer(x)
    model["rnn"].weight_hh_l0.data.zero_()
    torch.testing.assert_close(y, layer.eval()(x))


def test_a_parametrized_weight_is_dropped_after_its_parametrization():
    linear = parametrizations.weight_norm(nn.Linear(40, 30))
    keys, weight = list(linear.state_dict()), linear.weight.detach().clone()
    layer, x = DropConnect(linear, p=0.5), torch.randn(2, 40)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    torch.testing.assert_close(y, nn.functional.linear(x, dropout(weight, 0.5), linear.bias))
    assert list(linear.state_dict()) == keys
    assert torch.equal(layer.eval()(x), nn.functional.linear(x, weight, linear.bias))


def test_identity_in_eval_and_at_zero_and_after_an_exception():
    rnn, x = nn.LSTM(3, 4), torch.randn(2, 1, 3)
    layer = DropConnect(rnn, ["weight_hh_l0"], p=0.0)
    assert torch.equal(layer(x)[0], rnn(x)[0])
    layer.p = 0.9
    assert torch.equal(layer.eval()(x)[0], rnn(x)[0])
    with pytest.raises(RuntimeError):
        layer.train()(torch.randn(2, 1, 99))
    assert rnn._flat_weights[1] is rnn.weight_hh_l0


def test_copies_and_pickles():
    layer = DropConnect(parametrizations.weight_norm(nn.Linear(3, 2)), p=1.0)
    twin = copy.deepcopy(layer)
    layer.p = 0.0
    assert torch.equal(twin(torch.ones(1, 3))[0], twin.module.bias)
    plain = DropConnect(nn.Linear(3, 2), p=1.0)
    assert torch.equal(pickle.loads(pickle.dumps(plain))(torch.ones(1, 3))[0], plain.module.bias)


def test_gradcheck_bf16_and_compile():
    layer = DropConnect(nn.Linear(3, 2).double(), p=0.4)

    def seeded(x, *_):
        torch.manual_seed(0)
        return layer(x)

    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(seeded, (x, layer.module.weight))
    assert layer.bfloat16()(torch.ones(2, 3).bfloat16()).dtype == torch.bfloat16
    layer.p = 1.0
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.ones(1, 3).bfloat16())
    assert torch.equal(y[0], layer.module.bias)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"DropConnect\(weights='wieght'\): must name a parameter .* weight, bias"):
        DropConnect(nn.Linear(2, 2), "wieght")
    with pytest.raises(ValueError, match=r"DropConnect\(weights=\[\]\): weights must hold at least one parameter"):
        DropConnect(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match=r"DropConnect\(p=-0.1\): p must be in \[0, 1\]"):
        DropConnect(nn.Linear(2, 2), p=-0.1)
