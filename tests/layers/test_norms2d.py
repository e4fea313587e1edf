# SPDX-License-Identifier: Apache-2.0
"""Norms over the channels of images, and layers of other packages that compute the same."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_optkit.layers import LayerNorm2d, RMSNorm2d, swap_norms

SHAPES = [(2, 3, 4, 5), (1, 1, 1, 1), (3, 40, 7, 1), (2, 96, 14, 14), (0, 4, 3, 3), (2, 5, 0, 3)]
FORMATS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
LAYERS = {"layer": LayerNorm2d, "rms": RMSNorm2d}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def formula(kind, x, weight, bias, eps):
    """By the definition, in fp64."""
    x = x.double()
    centered = x - x.mean(1, keepdim=True) if kind == "layer" else x
    normal = centered / (centered.square().mean(1, keepdim=True) + eps).sqrt()
    scaled = normal * weight.double()[:, None, None]
    return scaled if bias is None else scaled + bias.double()[:, None, None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_results_and_gradients_are_those_of_the_formula(kind, dtype, memory_format, shape):
    torch.manual_seed(0)
    layer = LAYERS[kind](shape[1], eps=1e-3).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=FORMATS[memory_format]).requires_grad_()
    d_out = torch.randn(shape).to(dtype)
    out = layer(x)
    out.backward(d_out)

    wide = [t.detach().double().requires_grad_() for t in (x, *layer.parameters())]
    expected = formula(kind, wide[0], wide[1], wide[2] if kind == "layer" else None, 1e-3)
    expected.backward(d_out.double())
    assert out.shape == x.shape
    assert x.grad.shape == x.shape
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip((x, *layer.parameters()), wide, strict=True):
        atol = 8 * tolerance * max(1.0, float(theirs.grad.abs().max()) if theirs.grad.numel() else 1.0)
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=8 * tolerance, atol=atol)


def test_it_has_the_state_dict_and_the_numbers_of_torchs_norm_on_the_last_dimension():
    layer, torchs = LayerNorm2d(6), nn.LayerNorm(6, eps=1e-6)
    torchs.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 3, 4)
    torch.testing.assert_close(layer(x), torchs(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    assert list(LayerNorm2d(6, affine=False).parameters()) == []


@pytest.mark.parametrize("kind", LAYERS)
def test_scripted_and_exported_it_computes_the_same(kind):
    layer, x = LAYERS[kind](6), torch.randn(2, 6, 3, 4)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize("bad", [torch.ones(2, 6, 3), torch.ones(2, 5, 3, 4), torch.ones(6, 3, 4), 5], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_no_image_of_so_many_channels_is_refused(kind, bad):
    with pytest.raises((TypeError, ValueError), match=rf"^{LAYERS[kind].__name__}\(input"):
        LAYERS[kind](6)(bad)


class Permuting(nn.LayerNorm):
    """As timm's: torch's function on the permuted images."""

    def __init__(self, num_channels):
        super().__init__(num_channels, eps=1e-6)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class ByHand(nn.Module):
    """As ConvNeXt's: one class for both orders of the dimensions."""

    def __init__(self, channels, eps=1e-6, data_format="channels_first"):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps, self.data_format = eps, data_format

    def forward(self, x):
        if self.data_format == "channels_last":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).square().mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class RootMeanSquare(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(channels)), 1e-6

    def forward(self, x):
        normal = x.float() * torch.rsqrt(x.float().square().mean(1, keepdim=True) + self.eps)
        return (normal * self.weight.float()[:, None, None]).to(x.dtype)


FOREIGN = {"permuting": ("layer", Permuting), "by hand": ("layer", ByHand), "rms": ("rms", RootMeanSquare)}


@pytest.mark.parametrize("name", FOREIGN)
def test_layers_of_other_packages_are_recognized_by_their_results(name):
    kind, cls = FOREIGN[name]
    model = nn.Sequential(nn.Conv2d(3, 6, 3), cls(6), nn.ReLU())
    nn.init.normal_(model[1].weight)
    x, before = torch.randn(2, 3, 8, 8), copy.deepcopy(model)
    swaps = swap_norms(model, kind)
    assert [row.name for row in swaps.swapped] == ["1"]
    assert isinstance(model[1], LAYERS[kind])
    torch.testing.assert_close(model(x), before(x), rtol=1e-5, atol=1e-5)
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    torch.save(model.state_dict(), file := io.BytesIO())
    before.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    swaps.undo()
    assert type(model[1]) is cls
    torch.testing.assert_close(model(x), before(x), rtol=0, atol=0)


def test_one_class_may_be_of_both_kinds():
    model = nn.ModuleList([ByHand(6), ByHand(6, data_format="channels_last")])
    swap_norms(model, "layer")
    assert isinstance(model[0], LayerNorm2d)
    assert not isinstance(model[1], LayerNorm2d)
    x = torch.randn(2, 6, 3, 4)
    torch.testing.assert_close(model[1](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), model[0](x))


def test_other_norms_of_images_are_left_alone():
    class Scaled(Permuting):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleList([Scaled(6), nn.GroupNorm(1, 6), nn.InstanceNorm2d(6, affine=True), nn.BatchNorm2d(6)])
    assert swap_norms(model, "layer").swapped == []
    assert swap_norms(model, "rms").swapped == []
