# SPDX-License-Identifier: Apache-2.0
"""AdaBelief against an explicit implementation (Zhuang et al. 2020, Algorithm 2)."""

import pytest
import torch

from lightning_optkit.optimizers import AdaBelief


def written_out(values, gradients, lr, betas, eps, decay):
    """theta, m and s of the paper; like the authors' code, eps is also added to the root."""
    b1, b2 = betas
    theta = values.clone()
    m, s = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, g in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) ** 2 + eps
        m_hat, s_hat = m / (1 - b1**t), s / (1 - b2**t)
        theta = (1 - lr * decay) * theta - lr * m_hat / (s_hat.sqrt() + eps)
    return dict(theta=theta, exp_avg=m, exp_avg_var=s)


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize(("betas", "eps"), [((0.8, 0.95), 1e-4), ((0.9, 0.999), 1e-16)], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (16, 33)], ids=str)
def test_follows_the_algorithm_of_the_paper(shape, betas, eps, dtype, tolerance, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(shape, dtype=dtype), torch.randn(200, *shape, dtype=dtype)
    p = values.clone().requires_grad_()
    optimizer = AdaBelief([p], lr=3e-3, betas=betas, eps=eps, weight_decay=0.2, fused=fused)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    expected = written_out(values.double(), gradients.double(), 3e-3, betas, eps, 0.2)
    torch.testing.assert_close(p.detach().double(), expected.pop("theta"), rtol=0, atol=tolerance)
    for name, value in expected.items():
        torch.testing.assert_close(optimizer.state[p][name].double(), value, rtol=0, atol=tolerance)


def test_a_gradient_that_is_as_expected_is_followed_by_large_steps():
    steady, noisy = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = AdaBelief([steady, noisy], lr=0.1, betas=(0.9, 0.9))
    for step in range(50):
        steady.grad, noisy.grad = torch.tensor([1.0]), torch.tensor([2.0 * (step % 2)])  # of the same mean
        optimizer.step()
    assert steady.item() < 5 * noisy.item() < 0
