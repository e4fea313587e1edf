# SPDX-License-Identifier: Apache-2.0
"""gain: torch's values, and the second moment elsewhere."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_optkit.init import gain


@pytest.mark.parametrize("name", ["linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu"])
def test_torch_s_own_values(name):
    assert gain(name) == nn.init.calculate_gain(name)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (nn.ReLU(inplace=True), math.sqrt(2)),
        (F.relu, math.sqrt(2)),
        (nn.Identity(), 1),
        (nn.LeakyReLU(0.2), math.sqrt(2 / 1.04)),
        (nn.RReLU(0.1, 0.3), math.sqrt(2 / 1.04)),
        (nn.Tanh(), 5 / 3),
    ],
)
def test_modules_and_functions_that_torch_knows(activation, expected):
    assert gain(activation) == pytest.approx(expected, rel=1e-12)


def test_the_quadrature_agrees_with_known_integrals():
    assert gain(lambda z: z.clamp(min=0)) == pytest.approx(math.sqrt(2), rel=1e-7)
    assert gain(lambda z: 3 * z) == pytest.approx(1 / 3, rel=1e-7)
    assert gain(lambda z: z.square()) == pytest.approx(1 / math.sqrt(3), rel=1e-7)


@pytest.mark.parametrize("activation", ["gelu", nn.SiLU(), nn.Hardswish(), nn.Softplus()])
def test_other_activations_keep_the_second_moment(activation):
    z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))  # standard error about 0.2 %
    function = getattr(F, activation) if isinstance(activation, str) else activation
    assert gain(activation) ** 2 * float(function(z).square().mean()) == pytest.approx(1, rel=0.01)


def test_glu_keeps_the_second_moment_of_half_its_input():
    z = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    assert gain(nn.GLU()) ** 2 * float(F.glu(z).square().mean()) == pytest.approx(1, rel=0.01)


def test_rejects_what_is_not_elementwise():
    with pytest.raises(ValueError, match=r"gain\(activation=.*\): activation must map each element to one number\."):
        gain(torch.sum)


@pytest.mark.parametrize("function", [torch.zeros_like, torch.log], ids=["zero", "nan"])
def test_rejects_a_function_without_a_moment(function):
    with pytest.raises(ValueError, match=r"gain\(activation=.*\): activation must be finite and not zero everywhere\."):
        gain(function)


def test_rejects_a_number():
    with pytest.raises(TypeError, match=r"gain\(activation=2\): activation must be a name, a module or a function\."):
        gain(2)
