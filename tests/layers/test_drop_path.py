# SPDX-License-Identifier: Apache-2.0
"""DropPath: whole samples, the right fraction, scaled to keep the expectation."""

import pytest
import torch

from lightning_optkit.layers import DropPath


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_sample_is_kept_whole_and_scaled_or_dropped_whole(p):
    torch.manual_seed(0)
    x = torch.rand(20000, 2, 3) + 0.5
    factor = DropPath(p)(x) / x
    kept = factor[:, 0, 0] > 0
    expected = (kept / (1 - p))[:, None, None].expand_as(factor)
    torch.testing.assert_close(factor, expected)
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=0.012)  # three standard deviations and a bit


@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 4, 5)])
def test_any_shape(shape):
    assert DropPath(0.5)(torch.ones(shape)).shape == shape


def test_identity_in_eval_and_at_zero():
    x = torch.randn(4, 3)
    layer = DropPath(0.9)
    assert layer.eval()(x) is x and DropPath(0.0)(x) is x
    assert not DropPath(1.0)(x).any()


def test_a_dropped_infinity_is_zero_and_has_no_gradient():
    x = torch.full((100, 2), float("inf"), requires_grad=True)
    torch.manual_seed(0)
    y = DropPath(0.5)(x)
    y.sum().backward()
    assert not y.isnan().any() and torch.equal(x.grad, 2.0 * (y > 0))


def test_probability_can_be_scheduled_by_either_name():
    layer = DropPath(0.1)
    layer.p = 0.2
    assert layer.drop_prob == 0.2
    layer.drop_prob = 1.0
    assert layer.p == 1.0 and not layer(torch.ones(5, 2)).any()
    assert repr(layer) == "DropPath(p=1.0)"


def test_seeds_reproduce():
    layer, x = DropPath(0.5), torch.ones(64, 1)
    torch.manual_seed(3)
    first = layer(x)
    second = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)


def test_bf16_rounds_once():
    torch.manual_seed(0)
    x = torch.randn(64, 8, dtype=torch.bfloat16)
    y = DropPath(0.3)(x)
    kept = y[:, 0] != 0
    assert y.dtype == torch.bfloat16 and torch.equal(y[kept], (x[kept].double() / 0.7).to(torch.bfloat16))


def test_gradcheck():
    def seeded(x):
        torch.manual_seed(0)
        return DropPath(0.4)(x)

    assert torch.autograd.gradcheck(seeded, torch.randn(6, 3, dtype=torch.float64, requires_grad=True))


def test_compiles_without_a_graph_break():
    layer = DropPath(0.5)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.ones(200, 2))
    assert set(y.unique().tolist()) == {0.0, 2.0}


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"DropPath\(p=1.5\): p must be in \[0, 1\]"):
        DropPath(1.5)
    with pytest.raises(ValueError, match=r"DropPath\(drop_prob=-1\): drop_prob must be in \[0, 1\]"):
        DropPath().drop_prob = -1
    with pytest.raises(ValueError, match=r"DropPath\(x.shape=\(\)\): the first dimension"):
        DropPath(0.5)(torch.tensor(1.0))
