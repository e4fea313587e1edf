# SPDX-License-Identifier: Apache-2.0
"""GaussianNoise: the stated mean and standard deviation."""

import pytest
import torch

from lightning_optkit.data import GaussianNoise


def test_noise_is_normal_with_the_stated_moments():
    noise = GaussianNoise(mean=2.0, sigma=0.5)(torch.zeros(200, 500)) - 2
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std()) == pytest.approx(0.5, abs=0.01)
    assert float((noise.abs() < 0.5).float().mean()) == pytest.approx(0.6827, abs=0.01)
    assert float((noise[0] * noise[1]).mean()) == pytest.approx(0, abs=0.06)


def test_noise_is_added_to_the_input():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(GaussianNoise()(x) - x, GaussianNoise()(torch.zeros(30, 4)))
    assert torch.equal(GaussianNoise(sigma=0.0)(x), x)


def test_clips_only_when_asked():
    x = torch.full((1000,), 0.9)
    assert GaussianNoise()(x).max() > 1 and GaussianNoise(clip=True)(x).max() == 1


def test_negative_sigma_is_refused():
    with pytest.raises(ValueError, match=r"GaussianNoise\(sigma=-1.0\): sigma must be in \[0, inf\)"):
        GaussianNoise(sigma=-1.0)


def test_generator_must_be_on_the_cpu():
    class OnAnotherDevice:
        device = torch.device("cuda:0")

    with pytest.raises(ValueError, match=r"GaussianNoise\(generator=cuda:0\): must be on the CPU"):
        GaussianNoise(generator=OnAnotherDevice())
