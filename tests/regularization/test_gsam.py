# SPDX-License-Identifier: Apache-2.0
"""The combined gradient of GSAM against its formula, and its limits."""

import pytest
import torch

from lightning_optkit.regularization import gsam

GENERATOR = torch.Generator().manual_seed(0)
GRADS, PERTURBED = ([torch.randn(shape, generator=GENERATOR) for shape in ((3, 4), (5,))] for _ in range(2))


def flat(tensors):
    return torch.cat([t.flatten().double() for t in tensors])


@pytest.mark.parametrize("alpha", [0.1, 0.7])
def test_it_is_the_gradient_of_the_paper(alpha):
    """By the cosine, as in the authors' code."""
    g, g_p = flat(GRADS), flat(PERTURBED)
    cosine = (g @ g_p) / (g.norm() * g_p.norm())
    expected = g_p - alpha * (g - cosine * g.norm() * g_p / g_p.norm())
    torch.testing.assert_close(flat(gsam(GRADS, PERTURBED, alpha)), expected, rtol=1e-6, atol=1e-6)


def test_along_the_perturbed_gradient_nothing_is_lost():
    g, g_p = flat(GRADS), flat(PERTURBED)
    change = flat(gsam(GRADS, PERTURBED, 0.5)) - g_p
    assert abs(change @ g_p) < 1e-5 and change @ g < -0.1


def test_without_the_gap_it_is_sam():
    torch.testing.assert_close(gsam(GRADS, PERTURBED, 0.0), PERTURBED)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15, 1e30])
def test_gradients_of_any_size(scale):
    expected = gsam(GRADS, PERTURBED, 0.5)
    found = gsam([g * scale for g in GRADS], [g * scale for g in PERTURBED], 0.5)
    torch.testing.assert_close([t / scale for t in found], expected, rtol=1e-5, atol=1e-6)


def test_zero_and_missing_gradients():
    zero, one = torch.zeros(2), torch.ones(2)
    assert gsam([one], [zero], 0.5)[0].tolist() == [-0.5, -0.5]
    assert gsam([None, one], [None, one], 0.5)[0] is None
    assert gsam([one], [None], 0.5)[0].tolist() == [-0.5, -0.5] and gsam([None], [one], 0.5)[0].tolist() == [1.0, 1.0]
    assert gsam([], []) == []


def test_arguments_are_not_written_to():
    before = [t.clone() for t in (*GRADS, *PERTURBED)]
    gsam(GRADS, PERTURBED, 0.5)
    assert all(torch.equal(t, b) for t, b in zip((*GRADS, *PERTURBED), before, strict=True))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"^gsam\(alpha=-1\.0\): alpha must be in \[0, inf\)\.$"):
        gsam(GRADS, PERTURBED, -1.0)
    with pytest.raises(ValueError, match=r"^gsam\(perturbed=<1>\): there must be one for each of the 2 grads\.$"):
        gsam(GRADS, PERTURBED[:1])
