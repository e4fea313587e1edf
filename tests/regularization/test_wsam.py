# SPDX-License-Identifier: Apache-2.0
"""The combined gradient of WSAM against its formula, and its limits."""

import pytest
import torch

from lightning_optkit.regularization import wsam

GENERATOR = torch.Generator().manual_seed(0)
GRADS, PERTURBED = ([torch.randn(shape, generator=GENERATOR) for shape in ((3, 4), (5,))] for _ in range(2))


@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.5, 0.9])
def test_it_is_the_gradient_of_the_loss_and_weighted_sharpness(gamma):
    for found, g, g_p in zip(wsam(GRADS, PERTURBED, gamma), GRADS, PERTURBED, strict=True):
        sharpness = g_p.double() - g.double()
        torch.testing.assert_close(found.double(), g.double() + gamma / (1 - gamma) * sharpness, rtol=1e-5, atol=1e-5)


def test_half_is_sam():
    torch.testing.assert_close(wsam(GRADS, PERTURBED, 0.5), PERTURBED)


def test_missing_gradients_count_as_zero():
    one = torch.ones(2)
    assert wsam([None, one], [None, one])[0] is None
    assert wsam([one], [None], 0.75)[0].tolist() == [-2.0, -2.0]
    assert wsam([None], [one], 0.75)[0].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("gamma", [-0.1, 1.0, float("nan")])
def test_bad_arguments_are_refused(gamma):
    with pytest.raises(ValueError, match=r"^wsam\(gamma=.*\): gamma must be in \[0, 1\)\.$"):
        wsam(GRADS, PERTURBED, gamma)
    with pytest.raises(ValueError, match=r"^wsam\(perturbed=<1>\): there must be one for each of the 2 grads\.$"):
        wsam(GRADS, PERTURBED[:1])
