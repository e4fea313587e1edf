# SPDX-License-Identifier: Apache-2.0
"""he against torch.nn.init, bit for bit, and its variance for activations that torch has no gain for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_optkit.init import he

SHAPES = [(5, 7), (16, 8, 3), (6, 4, 3, 3), (2, 3, 2, 2, 2)]
TORCH = {"normal": nn.init.kaiming_normal_, "uniform": nn.init.kaiming_uniform_}


def seeded():
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("activation", ["linear", "sigmoid", "tanh", "relu", "selu"])
@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(shape, distribution, mode, activation):
    reference = torch.empty(shape)
    TORCH[distribution](reference, mode=mode, nonlinearity=activation, generator=seeded())
    ours = he(torch.empty(shape), activation=activation, mode=mode, distribution=distribution, generator=seeded())
    assert torch.equal(ours, reference)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_equals_torch_in_other_dtypes(dtype):
    reference = nn.init.kaiming_normal_(torch.empty(8, 8, dtype=dtype), nonlinearity="relu", generator=seeded())
    assert torch.equal(he(torch.empty(8, 8, dtype=dtype), generator=seeded()), reference)


@pytest.mark.parametrize(
    ("activation", "slope"), [(nn.LeakyReLU(0.3), 0.3), (nn.PReLU(4, init=0.25), 0.25), ("leaky_relu", 0.01)]
)
def test_reads_the_slope_off_the_module(activation, slope):
    reference = nn.init.kaiming_normal_(torch.empty(8, 8), a=slope, nonlinearity="leaky_relu", generator=seeded())
    assert torch.equal(he(torch.empty(8, 8), activation=activation, generator=seeded()), reference)


@pytest.mark.parametrize("activation", [F.gelu, nn.SiLU(), "mish", nn.ELU(), torch.relu])
def test_variance_makes_up_for_what_the_activation_takes(activation):
    generator = torch.Generator().manual_seed(0)
    function = activation if callable(activation) else getattr(F, activation)
    weight = he(torch.empty(400, 400), activation=activation, generator=generator)
    passed = function(torch.randn(400, 400, generator=generator)).square().mean()
    assert float(400 * weight.var() * passed) == pytest.approx(1, rel=0.03)  # standard error about 0.7 %


def test_rejects_an_unknown_mode():
    with pytest.raises(ValueError, match=r"he\(mode='fan_avg'\): mode must be one of 'fan_in', 'fan_out'\."):
        he(torch.empty(2, 2), mode="fan_avg")


def test_rejects_an_unknown_distribution():
    with pytest.raises(ValueError, match=r"he\(distribution=None\): distribution must be one of 'normal', 'uniform'\."):
        he(torch.empty(2, 2), distribution=None)
