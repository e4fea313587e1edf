# SPDX-License-Identifier: Apache-2.0
"""zero_residual: every block starts as the identity, or as its shortcut."""

import pytest
import torch
from torch import nn

from lightning_optkit.init import he, initialize, zero_residual


class Bottleneck(nn.Module):
    """The names of torchvision's."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.downsample = nn.Sequential(nn.Conv2d(channels, 8, 1), nn.BatchNorm2d(8)) if channels != 8 else None

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return y + (x if self.downsample is None else self.downsample(x))


def test_a_resnet_starts_as_its_shortcuts():
    model = nn.Module()
    model.layer1 = nn.Sequential(Bottleneck(3), Bottleneck(8))
    initialize(model, he)
    rows = zero_residual(model)
    assert [f"{row.module}.{row.parameter}" for row in rows] == [
        f"layer1.{i}.bn3.{name}" for i in range(2) for name in ("weight", "bias")
    ]
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    model.eval()
    assert torch.equal(model.layer1(x), model.layer1[0].downsample(x))


def test_a_pre_norm_transformer_starts_as_the_identity():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    initialize(model, he)
    zero_residual(model)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), x)


def test_a_pattern_of_one_s_own_and_the_rest_left_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = model[0].weight.clone()
    zero_residual(model, pattern=r"^1$")
    assert not model[1].weight.any() and not model[1].bias.any()
    assert torch.equal(model[0].weight, before)


def test_one_tensor_in_place():
    weight = torch.ones(3)
    assert zero_residual(weight) is weight
    assert not weight.any()


def test_rejects_a_model_without_branches():
    with pytest.raises(
        ValueError, match=r"zero_residual\(pattern='.*'\): pattern must match the name of a layer with a"
    ):
        zero_residual(nn.Sequential(nn.Linear(2, 2)))
