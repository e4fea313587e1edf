# SPDX-License-Identifier: Apache-2.0
"""Adan against an explicit implementation (Xie et al. 2022, Algorithm 1)."""

import pytest
import torch

from lightning_optkit.optimizers import Adan


def written_out(values, gradients, lr, betas, eps, decay, no_prox):
    """Algorithm 1 in its own letters: theta, m, v, n; its betas are 1 - ours. The hats are the code's."""
    b1, b2, b3 = (1 - beta for beta in betas)
    theta = values.clone()
    m, v, n = (torch.zeros_like(values) for _ in range(3))
    before = gradients[0]
    for k, g in enumerate(gradients, start=1):
        m = (1 - b1) * m + b1 * g
        v = (1 - b2) * v + b2 * (g - before)
        n = (1 - b3) * n + b3 * (g + (1 - b2) * (g - before)) ** 2
        m_hat, v_hat, n_hat = m / (1 - (1 - b1) ** k), v / (1 - (1 - b2) ** k), n / (1 - (1 - b3) ** k)
        eta = lr / (n_hat.sqrt() + eps)
        moved = eta * (m_hat + (1 - b2) * v_hat)
        theta = (1 - lr * decay) * theta - moved if no_prox else (theta - moved) / (1 + lr * decay)
        before = g
    return dict(theta=theta, exp_avg=m, exp_avg_diff=v, exp_avg_sq=n, previous_grad=before)


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("no_prox", [False, True])
@pytest.mark.parametrize("betas", [(0.98, 0.92, 0.99), (0.9, 0.5, 0.999)], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (16, 33)], ids=str)
def test_follows_the_algorithm_of_the_paper(shape, betas, no_prox, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(shape, dtype=torch.float64), torch.randn(50, *shape, dtype=torch.float64)
    p = values.clone().requires_grad_()
    optimizer = Adan([p], lr=1e-2, betas=betas, eps=1e-6, weight_decay=0.1, no_prox=no_prox, fused=fused)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    expected = written_out(values, gradients, 1e-2, betas, 1e-6, 0.1, no_prox)
    torch.testing.assert_close(p.detach(), expected.pop("theta"), rtol=1e-12, atol=1e-12)
    for name, value in expected.items():
        torch.testing.assert_close(optimizer.state[p][name], value, rtol=1e-12, atol=1e-12)


def test_cautious_decay_acts_where_the_update_does():
    p = torch.tensor([1.0, -1.0, 1.0], requires_grad=True)
    p.grad = torch.tensor([1.0, 1.0, -1.0])
    Adan([p], lr=0.1, weight_decay=1.0, no_prox=True, cautious=True).step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.8, -1.1, 1.1]))
