# SPDX-License-Identifier: Apache-2.0
"""xavier against torch.nn.init, bit for bit."""

import pytest
import torch
from torch import nn

from lightning_optkit.init import gain, xavier

SHAPES = [(5, 7), (16, 8, 3), (6, 4, 3, 3), (2, 3, 2, 2, 2)]  # linear, conv1d, conv2d, conv3d


def seeded():
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("activation", ["linear", "tanh", "relu"])
@pytest.mark.parametrize("distribution", ["uniform", "normal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(shape, distribution, activation):
    reference = torch.empty(shape)
    torch_init_ = {"uniform": nn.init.xavier_uniform_, "normal": nn.init.xavier_normal_}[distribution]
    torch_init_(reference, gain=nn.init.calculate_gain(activation), generator=seeded())

    ours = torch.empty(shape)
    returned = xavier(ours, activation=activation, distribution=distribution, generator=seeded())

    assert returned is ours
    assert torch.equal(ours, reference)


def test_an_activation_unknown_to_torch_scales_by_its_gain():
    plain, scaled = xavier(torch.empty(9, 9), generator=seeded()), torch.empty(9, 9)
    xavier(scaled, activation=nn.GELU(), generator=seeded())
    torch.testing.assert_close(scaled, plain * gain(nn.GELU()))


def test_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    xavier(torch.empty(4, 4), generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_fills_a_parameter_that_requires_grad():
    weight = nn.Parameter(torch.zeros(4, 4))
    xavier(weight)
    assert weight.is_leaf and weight.abs().sum() > 0


def test_rejects_an_unknown_distribution():
    with pytest.raises(
        ValueError, match=r"xavier\(distribution='cauchy'\): distribution must be one of 'uniform', 'no"
    ):
        xavier(torch.empty(2, 2), distribution="cauchy")


def test_rejects_an_unknown_activation():
    with pytest.raises(
        ValueError, match=r"^xavier\(activation='rleu'\): activation must be a module, a function or one of"
    ):
        xavier(torch.empty(2, 2), activation="rleu")


@pytest.mark.parametrize("shape", [(3,), (0, 3)], ids=str)
def test_rejects_a_shape_without_fans(shape):
    with pytest.raises(
        ValueError, match=r"xavier\(tensor of shape .*\): tensor must have at least 2 dimensions and one"
    ):
        xavier(torch.empty(shape))


def test_rejects_integers():
    with pytest.raises(TypeError, match=r"xavier\(tensor=torch.int64\): tensor must be a floating-point tensor\."):
        xavier(torch.zeros(2, 2, dtype=torch.long))


def test_rejects_the_meta_device():
    with pytest.raises(ValueError, match=r"xavier\(tensor on meta\): tensor must have storage"):
        xavier(torch.empty(2, 2, device="meta"))
