# SPDX-License-Identifier: Apache-2.0
"""AdEMAMix against an explicit implementation (Pagliardini et al. 2024, Algorithm 1)."""

import math

import pytest
import torch

from lightning_optkit.optimizers import AdEMAMix


def alpha_at(t, alpha, warmup):
    """min(t alpha / T, alpha)."""
    return alpha if warmup is None else min(t * alpha / warmup, alpha)


def beta3_at(t, beta3, start, warmup):
    """The paper's f_beta3: min(exp(ln bs ln b3 / ((1 - t/T) ln b3 + t/T ln bs)), b3)."""
    if warmup is None:
        return beta3
    low, high = math.log(start), math.log(beta3)
    return min(math.exp(low * high / ((1 - t / warmup) * high + t / warmup * low)), beta3) if t < warmup else beta3


def written_out(values, gradients, lr, betas, alpha, warmups, eps, decay):
    b1, b2, b3 = betas
    theta = values.clone()
    m1, m2, nu = (torch.zeros_like(values) for _ in range(3))
    for t, g in enumerate(gradients, start=1):
        a_t, b3_t = alpha_at(t, alpha, warmups[0]), beta3_at(t, b3, b1, warmups[1])
        m1 = b1 * m1 + (1 - b1) * g
        m2 = b3_t * m2 + (1 - b3_t) * g
        nu = b2 * nu + (1 - b2) * g**2
        m1_hat, nu_hat = m1 / (1 - b1**t), nu / (1 - b2**t)
        theta = theta - lr * ((m1_hat + a_t * m2) / (nu_hat.sqrt() + eps) + decay * theta)
    return dict(theta=theta, exp_avg=m1, exp_avg_slow=m2, exp_avg_sq=nu)


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("warmups", [(None, None), (30, 40), (100, 100)], ids=str)
@pytest.mark.parametrize("betas", [(0.9, 0.999, 0.9999), (0.5, 0.9, 0.99)], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (16, 33)], ids=str)
def test_follows_the_algorithm_of_the_paper(shape, betas, warmups, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(shape, dtype=torch.float64), torch.randn(50, *shape, dtype=torch.float64)
    p = values.clone().requires_grad_()
    optimizer = AdEMAMix(
        [p],
        lr=1e-2,
        betas=betas,
        alpha=5.0,
        alpha_warmup=warmups[0],
        beta3_warmup=warmups[1],
        eps=1e-6,
        weight_decay=0.1,
        fused=fused,
    )
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    expected = written_out(values, gradients, 1e-2, betas, 5.0, warmups, 1e-6, 0.1)
    torch.testing.assert_close(p.detach(), expected.pop("theta"), rtol=1e-12, atol=1e-12)
    for name, value in expected.items():
        torch.testing.assert_close(optimizer.state[p][name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("betas", [(0.0, 0.9, 0.99), (0.9, 0.9, 0.0), (0.0, 0.9, 0.0)], ids=str)
def test_decay_rates_of_zero_stay_finite_in_the_warmup(paths_agree, betas):
    paths_agree(lambda params, **kwargs: AdEMAMix(params, betas=betas, beta3_warmup=30, **kwargs), torch.float64)
