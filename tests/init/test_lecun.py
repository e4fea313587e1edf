# SPDX-License-Identifier: Apache-2.0
"""lecun against torch.nn.init, bit for bit, and the fixed point of self-normalizing networks."""

import pytest
import torch
from torch import nn

from lightning_optkit.init import lecun


@pytest.mark.parametrize("shape", [(5, 7), (6, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_equals_torch(shape, distribution):
    torch_init_ = {"normal": nn.init.kaiming_normal_, "uniform": nn.init.kaiming_uniform_}[distribution]
    reference = torch_init_(torch.empty(shape), nonlinearity="linear", generator=torch.Generator().manual_seed(3))
    ours = lecun(torch.empty(shape), distribution=distribution, generator=torch.Generator().manual_seed(3))
    assert torch.equal(ours, reference)


def test_keeps_a_selu_network_at_mean_zero_and_variance_one():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 256, generator=generator)
    for _ in range(30):
        x = torch.selu(x @ lecun(torch.empty(256, 256), generator=generator).T)
    assert abs(x.mean()) < 0.1
    assert 0.8 < x.var() < 1.25


def test_rejects_an_unknown_distribution():
    with pytest.raises(
        ValueError, match=r"lecun\(distribution='beta'\): distribution must be one of 'normal', 'uniform'"
    ):
        lecun(torch.empty(2, 2), distribution="beta")


def test_rejects_a_vector():
    with pytest.raises(ValueError, match=r"lecun\(tensor of shape \(3,\)\): tensor must have at least 2 dimensions"):
        lecun(torch.empty(3))
