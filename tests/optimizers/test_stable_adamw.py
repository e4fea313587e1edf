# SPDX-License-Identifier: Apache-2.0
"""StableAdamW against an explicit implementation (Wortsman et al. 2023, Algorithm 2)."""

import math

import pytest
import torch

from lightning_optkit.optimizers import StableAdamW

PATHS = pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])


def written_out(values, gradients, lr, betas, eps, decay):
    theta = values.clone()
    v, u = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, g in enumerate(gradients, start=1):
        b1, b2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in betas)
        v = b1 * v + (1 - b1) * g
        u = b2 * u + (1 - b2) * g**2
        rms = (g**2 / u.clamp(min=eps**2)).mean().sqrt()
        eta = lr / max(1.0, float(rms))
        theta = theta - eta * decay * theta - eta * v / (u.sqrt() + eps)
    return dict(theta=theta, exp_avg=v, exp_avg_sq=u)


def spiking(steps, shape, dtype):
    """Gradients of which some are 30 times as large, so that the rate falls."""
    gradients = torch.randn(steps, *shape, dtype=dtype)
    gradients[::17] *= 30
    return gradients


@PATHS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 5e-5)], ids=str)
@pytest.mark.parametrize(("betas", "eps"), [((0.8, 0.95), 1e-3), ((0.9, 0.99), 1e-6)], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (16, 33), (3, 20000)], ids=str)
def test_follows_the_algorithm_of_the_paper(shape, betas, eps, dtype, tolerance, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(shape, dtype=dtype), spiking(200 if math.prod(shape) < 10_000 else 20, shape, dtype)
    p = values.clone().requires_grad_()
    optimizer = StableAdamW([p], lr=1e-2, betas=betas, eps=eps, weight_decay=0.2, fused=fused)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    expected = written_out(values.double(), gradients.double(), 1e-2, betas, eps, 0.2)
    torch.testing.assert_close(p.detach().double(), expected.pop("theta"), rtol=tolerance, atol=tolerance)
    for name, value in expected.items():
        torch.testing.assert_close(optimizer.state[p][name].double(), value, rtol=tolerance, atol=tolerance)


@PATHS
def test_a_tensor_with_a_spike_moves_less_and_the_others_as_before(fused):
    calm, spiked = torch.zeros(5, requires_grad=True), torch.zeros(5, requires_grad=True)
    optimizer = StableAdamW([calm, spiked], lr=0.1, betas=(0.0, 0.99), weight_decay=0.0, fused=fused)
    for step in range(20):
        calm.grad, spiked.grad = torch.ones(5), torch.ones(5) * (100.0 if step == 19 else 1.0)
        before = calm.detach().clone(), spiked.detach().clone()
        optimizer.step()
    torch.testing.assert_close(before[0] - calm.detach(), torch.full((5,), 0.1), rtol=1e-4, atol=0)
    torch.testing.assert_close(before[1] - spiked.detach(), torch.full((5,), 0.1), rtol=1e-4, atol=0)  # AdamW: 0.41


@PATHS
def test_cautious_decay_acts_where_the_update_does(fused):
    p = torch.tensor([1.0, -1.0, 1.0], requires_grad=True)
    p.grad = torch.tensor([1.0, 1.0, -1.0])
    StableAdamW([p], lr=0.1, weight_decay=1.0, cautious=True, fused=fused).step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.8, -1.1, 1.1]))


def test_explain_tells_of_the_walk_for_the_root_mean_square():
    (plan,) = StableAdamW([torch.ones(3, requires_grad=True)]).explain().groups
    assert plan.bytes_per_element == 4 * (3 + 2 + 4)
