# SPDX-License-Identifier: Apache-2.0
"""The direction that LookSAM reuses, and the gradient with it, against their formulas."""

import pytest
import torch

from lightning_optkit.regularization import look_sam, look_sam_direction

GENERATOR = torch.Generator().manual_seed(0)
GRADS, PERTURBED = ([torch.randn(shape, generator=GENERATOR) for shape in ((3, 4), (5,))] for _ in range(2))


def flat(tensors):
    return torch.cat([t.flatten().double() for t in tensors])


def test_the_direction_is_what_is_perpendicular():
    g, g_p = flat(GRADS), flat(PERTURBED)
    cosine = (g @ g_p) / (g.norm() * g_p.norm())
    expected = g_p - g_p.norm() * cosine * g / g.norm()
    found = flat(look_sam_direction(GRADS, PERTURBED))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert abs(found @ g) < 1e-5


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_the_direction_is_added_at_a_length_relative_to_the_gradient(alpha):
    g, g_v = flat(GRADS), flat(PERTURBED)
    expected = g + alpha * g.norm() / g_v.norm() * g_v
    torch.testing.assert_close(flat(look_sam(GRADS, PERTURBED, alpha)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15, 1e30])
def test_gradients_of_any_size(scale):
    small, large = [g * scale for g in GRADS], [g * scale for g in PERTURBED]
    torch.testing.assert_close(look_sam(GRADS, large, 0.5), look_sam(GRADS, PERTURBED, 0.5))
    found, expected = look_sam_direction(small, large), look_sam_direction(GRADS, PERTURBED)
    torch.testing.assert_close([t / scale for t in found], expected, rtol=1e-5, atol=1e-6)


def test_zero_and_missing_tensors():
    zero, one = torch.zeros(2), torch.ones(2)
    assert look_sam_direction([zero], [one])[0].tolist() == [1.0, 1.0]
    assert look_sam([one], [zero])[0].tolist() == [1.0, 1.0]
    assert look_sam([one, None], [None, None]) == [one, None]
    assert look_sam([None, one], [one, None], 0.5)[0].tolist() == [0.5, 0.5]
    assert look_sam_direction([None, one], [one, one])[0].tolist() == [1.0, 1.0]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"^look_sam\(alpha=-1\.0\): alpha must be in \[0, inf\)\.$"):
        look_sam(GRADS, PERTURBED, -1.0)
    with pytest.raises(ValueError, match=r"^look_sam\(direction=<1>\): there must be one for each of the 2 grads\.$"):
        look_sam(GRADS, PERTURBED[:1])
    with pytest.raises(ValueError, match=r"^look_sam_direction\(perturbed=<1>\): there must be one for each of the 2"):
        look_sam_direction(GRADS, PERTURBED[:1])
