# SPDX-License-Identifier: Apache-2.0
"""WeightStandardizedConv2d: torch's convolution with filters of mean 0 and variance 1."""

import pytest
import torch
from torch import nn

from lightning_optkit.layers import WeightStandardizedConv2d

CASES = [dict(), dict(stride=2, padding=1), dict(groups=2, bias=False), dict(padding=1, padding_mode="circular")]


@pytest.mark.parametrize("arguments", CASES)
def test_is_torchs_convolution_with_the_written_out_weight(arguments):
    layer = WeightStandardizedConv2d(4, 6, 3, dtype=torch.float64, eps=1e-3, **arguments)
    torchs = nn.Conv2d(4, 6, 3, dtype=torch.float64, **arguments)
    torchs.load_state_dict(layer.state_dict())
    w = layer.weight.detach()
    mean = w.mean((1, 2, 3), keepdim=True)
    variance = (w - mean).square().mean((1, 2, 3), keepdim=True)
    torchs.weight.data = (w - mean) / (variance + 1e-3).sqrt()
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torchs(x))


def test_state_dict_goes_to_torch_and_back_and_keeps_the_raw_weight():
    layer, torchs = WeightStandardizedConv2d(3, 5, 3), nn.Conv2d(3, 5, 3)
    layer.load_state_dict(torchs.state_dict())
    torchs.load_state_dict(layer.state_dict())
    assert torch.equal(layer.weight, torchs.weight)


def test_shift_and_scale_of_a_filter_do_not_matter():
    layer, x = WeightStandardizedConv2d(3, 5, 3, eps=1e-12, dtype=torch.float64), torch.randn(1, 3, 5, 5).double()
    before = layer(x)
    layer.weight.data.mul_(3).add_(0.5)
    torch.testing.assert_close(layer(x), before)


def test_gradcheck_of_input_and_weight():
    layer = WeightStandardizedConv2d(2, 2, 2, dtype=torch.float64)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.weight, layer.bias))


def test_bf16_and_compile():
    layer, x = WeightStandardizedConv2d(3, 4, 3).bfloat16(), torch.randn(1, 3, 5, 5).bfloat16()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer.float()(x.float()), rtol=0.03, atol=0.1)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"WeightStandardizedConv2d\(groups=4\): a filter of a single weight"):
        WeightStandardizedConv2d(4, 4, 1, groups=4)
    with pytest.raises(ValueError, match=r"WeightStandardizedConv2d\(eps=0\): eps must be in \(0, inf\)"):
        WeightStandardizedConv2d(4, 4, 3, eps=0)


@pytest.mark.parametrize(
    ("arguments", "scale"),
    [
        ((256, 32, 3), 1.0),  # variance of torch's default: 1.4e-4
        ((4096, 8, 1), 0.1),
        ((64, 64, 7), 0.01),
        ((2048, 16, 3), 0.01),  # a standard deviation of 4e-5
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_variance_is_1_however_small_the_weights_are(arguments, scale, dtype):
    layer = WeightStandardizedConv2d(*arguments, bias=False, dtype=dtype)
    layer.weight.data.mul_(scale)
    filters = layer.standardized_weight().detach().double().flatten(1)
    assert filters.mean(1).abs().max() < 1e-2
    assert filters.var(1, correction=0).mean() == pytest.approx(1, abs=0.06 if scale == 0.01 else 2e-3)


def test_a_constant_filter_gives_zeros_and_a_finite_gradient():
    layer = WeightStandardizedConv2d(3, 2, 3)
    layer.weight.data.fill_(0.25)
    layer(torch.randn(1, 3, 5, 5)).sum().backward()
    assert torch.equal(layer.standardized_weight(), torch.zeros(2, 3, 3, 3))
    assert layer.weight.grad.isfinite().all()
