# SPDX-License-Identifier: Apache-2.0
"""MARS against an explicit implementation (Yuan et al. 2024, MARS-AdamW with the previous batch's gradient)."""

import math

import pytest
import torch

from lightning_optkit.optimizers import MARS

PATHS = pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])


def written_out(values, gradients, lr, betas, eps, decay, gamma, bound):
    b1, b2 = betas
    x = values.clone()
    m, v, before = (torch.zeros_like(x) for _ in range(3))
    for t, g in enumerate(gradients, start=1):
        c = g + gamma * b1 / (1 - b1) * (g - before)
        c = c * min(1.0, bound / float(c.norm()))
        m = b1 * m + (1 - b1) * c
        v = b2 * v + (1 - b2) * c**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        x = x - lr * (m_hat / (v_hat.sqrt() + eps) + decay * x)
        before = g
    return dict(x=x, exp_avg=m, exp_avg_sq=v, previous_grad=before)


@PATHS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("bound", [0.7, 20.0, math.inf])  # in every step, in some, in none
@pytest.mark.parametrize("shape", [(), (7,), (16, 33), (3, 20000)], ids=str)
def test_follows_the_algorithm_of_the_paper(shape, bound, dtype, tolerance, fused):
    torch.manual_seed(0)
    steps = 200 if math.prod(shape) < 10_000 else 10
    values, gradients = torch.randn(shape, dtype=dtype), torch.randn(steps, *shape, dtype=dtype)
    p = values.clone().requires_grad_()
    given = dict(betas=(0.8, 0.95), eps=1e-4, weight_decay=0.2, gamma=0.1)
    optimizer = MARS([p], lr=3e-3, max_corrected_norm=bound, fused=fused, **given)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    expected = written_out(values.double(), gradients.double(), 3e-3, *given.values(), bound)
    torch.testing.assert_close(p.detach().double(), expected.pop("x"), rtol=0, atol=tolerance)
    for name, value in expected.items():
        torch.testing.assert_close(optimizer.state[p][name].double(), value, rtol=0, atol=tolerance)


@PATHS
def test_without_correction_and_bound_it_is_adamw(fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(5, 7), torch.randn(20, 5, 7)
    p, q = values.clone().requires_grad_(), values.clone().requires_grad_()
    given = dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    optimizer = MARS([dict(params=[p], gamma=0.0, max_corrected_norm=math.inf)], fused=fused, **given)
    expected = torch.optim.AdamW([q], **given)
    for g in gradients:
        p.grad, q.grad = g.clone(), g.clone()
        optimizer.step()
        expected.step()
    torch.testing.assert_close(p, q, rtol=0, atol=2e-6)


@PATHS
@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_eps_is_added_to_the_corrected_root_and_nothing_else_is(size, fused):
    p = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    given = dict(lr=1.0, betas=(0.9, 0.99), eps=0.5 * size, gamma=0.0, max_corrected_norm=math.inf)
    optimizer = MARS([p], fused=fused, **given)
    p.grad = torch.full((4,), size, dtype=torch.float64)
    optimizer.step()  # the first step: m_t and v_t, corrected, are the gradient and its square
    torch.testing.assert_close(p.detach(), torch.full((4,), -1 / 1.5, dtype=torch.float64), rtol=1e-12, atol=0)


@PATHS
def test_gradients_written_in_place_are_told_from_the_previous_ones(fused):
    torch.manual_seed(0)
    gradients, weights = torch.randn(5, 3, 4), []
    for in_place in (False, True):
        p = torch.zeros(3, 4, requires_grad=True)
        optimizer, p.grad = MARS([p], lr=0.1, gamma=0.5, fused=fused), torch.zeros(3, 4)
        for gradient in gradients:
            p.grad = p.grad.copy_(gradient) if in_place else gradient.clone()  # zero_grad(set_to_none=False) writes too
            optimizer.step()
        weights.append(p.detach())
    assert torch.equal(*weights)


@PATHS
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_the_norm_of_very_small_and_large_gradients_is_right_in_single_precision(scale, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(300), torch.randn(5, 300) * scale
    p = values.clone().requires_grad_()
    optimizer = MARS([p], lr=1e-2, eps=1e-2 * min(scale, 1.0), max_corrected_norm=scale, fused=fused)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    if scale < 1:  # moments of more are not held by fp32
        assert p.isfinite().all()
        return
    assert optimizer.state[p]["exp_avg"].double().norm() <= scale


def test_explain_tells_of_the_walk_for_the_norm():
    (plan,) = MARS([torch.ones(3, requires_grad=True)]).explain().groups
    assert plan.bytes_per_element == 4 * (3 + 2 + 6)
