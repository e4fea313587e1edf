# SPDX-License-Identifier: Apache-2.0
"""The estimates of the gradient noise scale, against what they estimate."""

import math

import pytest
import torch

from lightning_optkit.diagnostics import GradientNoiseScale, gradient_noise_scale


def test_unbiased_for_a_known_noise():
    """Linear loss: the gradient of a sample is the sample itself, so mean and covariance are known."""
    generator = torch.Generator().manual_seed(0)
    mean, deviation = torch.tensor([0.3, -0.2, 0.0], dtype=torch.float64), torch.tensor([1.0, 0.5, 2.0]).double()
    measured = []
    for _ in range(4000):
        samples = mean + deviation * torch.randn(24, 3, generator=generator, dtype=torch.float64)
        measured.append(gradient_noise_scale([[part.mean(0)] for part in samples.chunk(3)], samples=8))
    noise = torch.tensor([m.noise for m in measured])
    square = torch.tensor([m.gradient_square for m in measured])
    for found, right in ((noise, 5.25), (square, 0.13)):
        assert abs(found.mean() - right) < 4 * found.std() / math.sqrt(len(found))
    assert noise.std() / math.sqrt(len(noise)) < 0.05 * 5.25  # or the line above would see no error


def test_the_two_equations_are_solved():
    parts = [[torch.randn(4, 3), torch.randn(7)] for _ in range(5)]
    found = gradient_noise_scale(parts, samples=6)
    small = sum(sum(g.double().square().sum() for g in part) for part in parts) / 5
    mean = [torch.stack([part[place].double() for part in parts]).mean(0) for place in range(2)]
    assert found.gradient_square + found.noise / 6 == pytest.approx(float(small), rel=1e-6)
    assert found.gradient_square + found.noise / 30 == pytest.approx(
        float(sum(g.square().sum() for g in mean)), rel=1e-5
    )


def test_equal_parts_have_no_noise():
    found = gradient_noise_scale([[torch.ones(4)], [torch.ones(4)]], samples=3)
    assert found == GradientNoiseScale(noise=0.0, gradient_square=4.0) and found.batch_size == 0.0


def test_opposite_parts_have_no_signal():
    found = gradient_noise_scale([[torch.ones(4)], [-torch.ones(4)]], samples=3)
    assert found.gradient_square == -4.0 and found.batch_size == math.inf


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "complex", "sparse", "missing", "generator"])
def test_every_kind_of_gradient(kind):
    a, b = torch.tensor([[3.0, 1.0], [2.0, 0.0]]), torch.tensor([[3.0, -1.0], [1.0, 1.0]])
    expected = gradient_noise_scale([[a], [b]], samples=2)
    changed = {
        "bfloat16": lambda g: [g.bfloat16()],
        "float16": lambda g: [g.half()],
        "complex": lambda g: [torch.complex(g[0], g[1])],
        "sparse": lambda g: [g.to_sparse()],
        "missing": lambda g: [None, g],
        "generator": lambda g: (each for each in [g]),
    }[kind]
    assert gradient_noise_scale((changed(g) for g in (a, b)), samples=2) == expected


def test_a_gradient_of_one_part_alone():
    one, zero = torch.ones(3), torch.zeros(3)
    assert gradient_noise_scale([[one], [None]], 2) == gradient_noise_scale([[one], [zero]], 2)


def test_large_gradients_do_not_overflow():
    found = gradient_noise_scale([[torch.full((3,), 1e19)], [torch.full((3,), 1e19)]], samples=1)
    assert found.gradient_square == pytest.approx(3e38, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[torch.ones(2)]], 1), ValueError, "at least two parts"),
        (([], 1), ValueError, "at least two parts"),
        (([[torch.ones(2)], []], 1), ValueError, "same gradients"),
        (([[torch.ones(2)], [torch.ones(2)]], 0), ValueError, "samples"),
        (([[1.0], [2.0]], 1), TypeError, "tensor"),
        ((3, 1), TypeError, "gradients"),
        (([torch.ones(2), torch.ones(2)], 1), TypeError, "list of gradients"),
    ],
    ids=["one", "none", "lengths", "no sample", "numbers", "int", "tensors"],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        gradient_noise_scale(*arguments)
    assert str(raised.value).startswith("gradient_noise_scale(")
