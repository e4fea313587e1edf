# SPDX-License-Identifier: Apache-2.0
"""LAMB against an explicit implementation (You et al. 2020, Algorithm 2)."""

import math

import pytest
import torch

from lightning_optkit.clipping import ClipNorm, ClipUnitwise
from lightning_optkit.optimizers import LAMB


def written_out(values, gradients, lr, betas, eps, decay, bounds):
    """x of the paper, in fp64; `decay` is its lambda, `bounds` are those of phi."""
    beta1, beta2 = betas
    x = values.double().clone()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g.double()
        v = beta2 * v + (1 - beta2) * g.double() ** 2
        r = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        direction = r + decay * x
        phi = min(max(float(x.norm()), bounds[0]), bounds[1])
        x = x - lr * phi / direction.norm() * direction
    return x


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("bounds", [(0.0, math.inf), (2.0, 3.0)], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (16, 33), (3, 20000)], ids=str)
def test_follows_the_algorithm_of_the_paper(shape, bounds, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(shape, dtype=torch.float64), torch.randn(20, *shape, dtype=torch.float64)
    p = values.clone().requires_grad_()
    optimizer = LAMB([p], lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1, norm_bounds=bounds, fused=fused)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    expected = written_out(values, gradients, 1e-2, (0.8, 0.95), 1e-6, 0.1, bounds)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("grad_scale", [1e-10, 1.0, 1e10, 1e17])  # second moments of more or less are not held by fp32
@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1.0, 1e10, 1e20])
def test_any_scale_of_weights_in_single_precision(scale, grad_scale, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(3, 700) * scale, torch.randn(6, 3, 700) * grad_scale
    p = values.clone().requires_grad_()
    optimizer = LAMB([p], lr=1e-2, betas=(0.8, 0.95), eps=1e-15, weight_decay=0.0, fused=fused)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    expected = written_out(values, gradients, 1e-2, (0.8, 0.95), 1e-15, 0.0, (0.0, math.inf))
    torch.testing.assert_close(p.detach().double() / scale, expected / scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("grad_scale", [1e-30, 1e-20, 1e-12])
def test_updates_whose_squares_underflow_have_a_norm_all_the_same(grad_scale, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(3, 700), torch.randn(3, 3, 700) * grad_scale
    p = values.clone().requires_grad_()
    optimizer = LAMB([p], lr=1e-2, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.0, fused=fused)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    expected = written_out(values, gradients, 1e-2, (0.8, 0.95), 1e-2, 0.0, (0.0, math.inf))
    torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kwargs", [dict(clip=ClipNorm(0.5)), dict(clip=ClipUnitwise(0.1), centralize=True), dict(l1=0.01)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compiled_step_is_the_reference_step_with_stages(kwargs, dtype):
    results = []
    for fused in (None, False):
        torch.manual_seed(0)
        params = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((5, 7), (), (300,))]
        optimizer = LAMB(params, lr=1e-2, fused=fused, statistics=True, **kwargs)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            optimizer.step()
        results.append(params)
    torch.testing.assert_close(*results, rtol=0, atol=2e-6 if dtype == torch.float32 else 3 * 2**-6)


def test_a_group_that_does_not_adapt_is_adam_with_decoupled_decay():
    torch.manual_seed(0)
    values, gradients = torch.randn(5, 7), torch.randn(10, 5, 7)
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    optimizer = LAMB([dict(params=[ours], adapt=False)], lr=1e-2, eps=1e-8, weight_decay=0.1)
    expected = torch.optim.AdamW([theirs], lr=1e-2, eps=1e-8, weight_decay=0.1)
    for g in gradients:
        ours.grad, theirs.grad = g.clone(), g.clone()
        optimizer.step()
        expected.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
def test_a_layer_of_zeros_moves_at_the_rate_itself(fused):
    p = torch.zeros(2, requires_grad=True)
    p.grad = torch.tensor([1.0, -1.0])
    LAMB([p], lr=0.5, fused=fused).step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.5, 0.5]))


def test_explain_tells_of_the_second_walk():
    (plan,) = LAMB([torch.ones(3, requires_grad=True)]).explain().groups
    assert (plan.stages, plan.bytes_per_element) == (("trust", "update"), 28 + 16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_trust_clip_bounds_the_ratio_by_one(dtype):
    """LAMBC: min(|x| / |r + lambda x|, 1)."""
    torch.manual_seed(0)
    values = torch.randn(5, 7, dtype=torch.float64) * 0.9
    gradients = torch.randn(200, 5, 7, dtype=torch.float64)
    p = values.clone().to(dtype).requires_grad_()
    optimizer = LAMB([p], lr=0.02, betas=(0.8, 0.95), weight_decay=0.1, trust_clip=True)
    x, m, v, ratios = values.clone(), torch.zeros_like(values), torch.zeros_like(values), []
    for t, g in enumerate(gradients, start=1):
        p.grad = g.to(dtype)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        direction = (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6) + 0.1 * x
        ratios.append(float(x.norm() / direction.norm()))
        x = x - 0.02 * min(ratios[-1], 1.0) * direction
    assert min(ratios) < 1 < max(ratios)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(p.detach().double(), x, rtol=tolerance, atol=tolerance)
    assert "no kernel that clips the trust ratio" in str(optimizer.explain())


def test_trust_clip_is_a_flag():
    with pytest.raises(ValueError, match=r"LAMB\(trust_clip=None\): trust_clip must be one of False, True"):
        LAMB([torch.ones(2, requires_grad=True)], trust_clip=None)
