# SPDX-License-Identifier: Apache-2.0
"""The ascent of SAM: length, direction, and invariances."""

import pytest
import torch

from lightning_optkit.regularization import sam


def grads(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 4), (5,))]


def norm(tensors):
    return torch.linalg.vector_norm(torch.cat([t.flatten().double() for t in tensors]))


@pytest.mark.parametrize("rho", [1e-3, 0.05, 20.0])
def test_it_has_the_length_rho_and_the_direction_of_the_gradient(rho):
    steps = sam(grads(), rho)
    torch.testing.assert_close(norm(steps), torch.tensor(rho, dtype=torch.float64), rtol=1e-6, atol=0)
    for step, grad in zip(steps, grads(), strict=True):
        torch.testing.assert_close(step, grad * rho / norm(grads()).float())


def test_no_step_to_a_nearby_point_raises_a_linear_loss_more():
    best = sum((s * g).sum() for s, g in zip(sam(grads(), 0.1), grads(), strict=True))
    for seed in range(20):
        other = [torch.randn(g.shape, generator=torch.Generator().manual_seed(seed)) for g in grads()]
        other = [0.1 * o / norm(other).float() for o in other]
        assert sum((o * g).sum() for o, g in zip(other, grads(), strict=True)) <= best + 1e-6


@pytest.mark.parametrize("factor", [1e-36, 1e-30, 1e-15, 1e-6, 1024.0, 1e15, 1e22, 1e30])
def test_a_factor_on_the_loss_changes_nothing(factor):
    torch.testing.assert_close(sam([factor * g for g in grads()], 0.1), sam(grads(), 0.1))


def test_a_gradient_of_zero_and_a_missing_one_give_no_step():
    assert sam([torch.zeros(2), None], 100.0)[0].tolist() == [0.0, 0.0]
    assert sam([None, torch.ones(1)])[0] is None
    assert sam([None]) == [None] and sam([]) == []


def test_what_is_not_finite_stays_so():
    (step,) = sam([torch.tensor([1.0, torch.inf])])
    assert step[0] == 0 and torch.isnan(step[1])


def test_in_16_bits_the_norm_does_not_overflow():
    (step,) = sam([torch.full((4,), 6e4, dtype=torch.float16)], 1.0)
    torch.testing.assert_close(step, torch.full((4,), 0.5, dtype=torch.float16))


@pytest.mark.parametrize("rho", [0.0, -1.0, float("nan")])
def test_bad_input_is_refused(rho):
    with pytest.raises(ValueError, match=r"^sam\(rho=.*\): rho must be in \(0, inf\)\.$"):
        sam(grads(), rho)
