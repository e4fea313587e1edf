# SPDX-License-Identifier: Apache-2.0
"""LARS against an explicit implementation (You et al. 2017, Algorithm 1)."""

import pytest
import torch

from lightning_optkit.clipping import ClipValue
from lightning_optkit.optimizers import LARS


def written_out(values, gradients, lr, momentum, decay, eta):
    """w of the paper, in fp64; `decay` is its beta."""
    w = values.double().clone()
    v = torch.zeros_like(w)
    for g in gradients:
        local = eta * w.norm() / (g.double().norm() + decay * w.norm())
        v = momentum * v + lr * local * (g.double() + decay * w)
        w = w - v
    return w


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(), (7,), (16, 33), (3, 20000)], ids=str)
def test_follows_the_algorithm_of_the_paper(shape, decay, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(shape, dtype=torch.float64), torch.randn(20, *shape, dtype=torch.float64)
    p = values.clone().requires_grad_()
    optimizer = LARS([p], lr=1.0, momentum=0.8, weight_decay=decay, trust_coefficient=0.02, fused=fused)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    expected = written_out(values, gradients, 1.0, 0.8, decay, 0.02)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("grad_scale", [1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e30])
@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1.0, 1e10, 1e20])
def test_any_scale_of_weights_and_gradients_in_single_precision(scale, grad_scale, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(3, 700) * scale, torch.randn(6, 3, 700) * grad_scale
    p = values.clone().requires_grad_()
    optimizer = LARS([p], lr=1.0, momentum=0.8, trust_coefficient=0.02, fused=fused)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    expected = written_out(values, gradients, 1.0, 0.8, 0.0, 0.02)
    assert not torch.allclose(expected, values.double(), rtol=0.01, atol=0)
    torch.testing.assert_close(p.detach().double() / scale, expected / scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("lr", [0.003, 2.0])
@pytest.mark.parametrize("zeros", [False, True], ids=["weights", "zeros"])
def test_trust_clip_takes_the_smaller_rate(zeros, lr, dtype):
    """LARC: a layer's rate is min(eta |w| / (|g| + beta |w|), lr); 1, before the minimum, for a layer of zeros."""
    torch.manual_seed(0)
    values, gradients = (
        torch.randn(5, 7) * (not zeros),
        torch.randn(200, 5, 7) * torch.logspace(-2, 2, 200)[:, None, None],
    )
    p = values.clone().to(dtype).requires_grad_()
    settings = dict(lr=lr, momentum=0.8, weight_decay=0.1, trust_coefficient=0.02)
    optimizer = LARS([p], trust_clip=True, **settings)
    w, v, clipped = values.double().clone(), torch.zeros(5, 7, dtype=torch.float64), 0
    for g in gradients:
        p.grad = g.to(dtype)
        optimizer.step()
        local = 0.02 * w.norm() / (g.double().norm() + 0.1 * w.norm()) if w.norm() > 0 else torch.tensor(1.0)
        clipped += int(local > lr)
        v = 0.8 * v + min(float(local), lr) * (g.double() + 0.1 * w)
        w = w - v
    torch.testing.assert_close(p.detach().double(), w, rtol=1e-11 if dtype == torch.float64 else 1e-4, atol=1e-4)
    if dtype == torch.float64:
        torch.testing.assert_close(p.detach(), w, rtol=1e-11, atol=1e-11)
    assert 0 < clipped < 200 or lr == 2.0
    assert "no kernel that clips the trust ratio" in str(optimizer.explain())


def test_trust_clip_may_be_set_during_a_run():
    p = torch.ones(4, 4, requires_grad=True)
    optimizer = LARS([p], lr=1e-3, momentum=0.0, trust_coefficient=10.0)
    moved = []
    for is_clipped in (False, True):
        optimizer.param_groups[0]["trust_clip"] = is_clipped
        before, p.grad = p.detach().clone(), torch.ones(4, 4)
        optimizer.step()
        moved.append(float((before - p.detach()).mean()))
    assert moved == pytest.approx([1e-2, 1e-3], rel=1e-4)


def test_trust_clip_is_a_flag():
    with pytest.raises(ValueError, match=r"LARS\(trust_clip=1\): trust_clip must be one of False, True"):
        LARS([torch.ones(2, requires_grad=True)], trust_clip=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_is_of_the_clipped_gradient(dtype):
    results = []
    for fused in (None, False):
        torch.manual_seed(0)
        params = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((5, 7), (), (300,))]
        optimizer = LARS(params, trust_coefficient=0.1, clip=ClipValue(0.3), centralize=True, fused=fused)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            optimizer.step()
        results.append(params)
    torch.testing.assert_close(*results, rtol=0, atol=2e-6 if dtype == torch.float32 else 3 * 2**-6)


def test_a_group_that_does_not_adapt_is_momentum_descent():
    torch.manual_seed(0)
    values, gradients = torch.randn(5, 7), torch.randn(10, 5, 7)
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    optimizer = LARS([dict(params=[ours], adapt=False)], lr=0.1, weight_decay=0.1)
    expected = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.1)
    for g in gradients:
        ours.grad, theirs.grad = g.clone(), g.clone()
        optimizer.step()
        expected.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize(("value", "grad"), [(0.0, 1.0), (1.0, 0.0)])
def test_without_a_ratio_the_rate_is_the_global_one(value, grad, fused):
    p = torch.full((2,), value, requires_grad=True)
    p.grad = torch.full((2,), grad)
    LARS([p], lr=0.5, fused=fused).step()
    assert p.tolist() == [value - 0.5 * grad] * 2


def test_explain_tells_of_the_second_walk_which_leaves_the_state_alone():
    (plan,) = LARS([torch.ones(3, requires_grad=True)]).explain().groups
    assert (plan.stages, plan.bytes_per_element) == (("trust", "update"), 20 + 8)
