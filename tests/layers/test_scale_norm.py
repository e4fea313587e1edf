# SPDX-License-Identifier: Apache-2.0
"""ScaleNorm: every row gets the same learned length."""

import pytest
import torch

from lightning_optkit.layers import ScaleNorm


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (0, 6)])
def test_is_the_formula(shape):
    layer, x = ScaleNorm(6).double(), torch.randn(shape, dtype=torch.float64)
    layer.scale.data.fill_(1.7)
    torch.testing.assert_close(layer(x), 1.7 * x / x.square().sum(-1, keepdim=True).sqrt())


def test_starts_at_the_square_root_of_the_dimension():
    assert ScaleNorm(16).scale.tolist() == [4.0]


def test_a_row_of_zeros_is_divided_by_eps():
    x = torch.zeros(1, 4, requires_grad=True)
    ScaleNorm(4, eps=0.5)(x).sum().backward()
    assert torch.equal(x.grad, torch.full((1, 4), 4.0))  # scale 2 over eps 0.5


def test_bf16_is_computed_in_float32():
    x = (torch.randn(8, 64) * 100).bfloat16()
    layer = ScaleNorm(64)
    expected = 8 * x.double() / x.double().norm(dim=-1, keepdim=True)
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).double(), expected, rtol=2**-8, atol=0)


def test_gradcheck_of_input_and_scale():
    layer, x = ScaleNorm(4).double(), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: layer(x), (x, layer.scale))


def test_compiles_without_a_graph_break():
    layer, x = ScaleNorm(4), torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"ScaleNorm\(dim=0\): dim must be an integer >= 1"):
        ScaleNorm(0)
    with pytest.raises(ValueError, match=r"ScaleNorm\(eps=0\): eps must be in \(0, inf\)"):
        ScaleNorm(4, eps=0)
    with pytest.raises(ValueError, match=r"ScaleNorm\(x.shape=\(2, 3\)\): the last dimension must be 4"):
        ScaleNorm(4)(torch.ones(2, 3))
