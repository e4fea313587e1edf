# SPDX-License-Identifier: Apache-2.0
"""ADOPT against an explicit implementation (Taniguchi et al. 2024, Algorithm 2)."""

import pytest
import torch

from lightning_optkit.optimizers import ADOPT


def written_out(values, gradients, lr, betas, eps, exponent, decay, decouple):
    """Algorithm 2 in its own letters; without `exponent` Algorithm 1. `decay` is not in the paper."""
    b1, b2 = betas
    theta, m = values.clone(), torch.zeros_like(values)
    g0 = gradients[0] if decouple else gradients[0] + decay * theta
    v = g0 * g0
    for t, g in enumerate(gradients[1:], start=1):
        g = g if decouple else g + decay * theta
        normed = g / torch.maximum(v.sqrt(), torch.tensor(eps, dtype=v.dtype))
        c = t**exponent if exponent is not None else float("inf")
        m = b1 * m + (1 - b1) * normed.clamp(-c, c)
        theta = theta - lr * m - (lr * decay * theta if decouple else 0)
        v = b2 * v + (1 - b2) * g * g
    return dict(theta=theta, exp_avg=m, exp_avg_sq=v)


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("decouple", [False, True])
@pytest.mark.parametrize("exponent", [0.25, 0.0, None])
@pytest.mark.parametrize("betas", [(0.9, 0.9999), (0.0, 0.5)], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (16, 33)], ids=str)
def test_follows_the_algorithm_of_the_paper(shape, betas, exponent, decouple, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(shape, dtype=torch.float64), torch.randn(50, *shape, dtype=torch.float64)
    p = values.clone().requires_grad_()
    optimizer = ADOPT(
        [p], lr=1e-2, betas=betas, clip_exponent=exponent, weight_decay=0.1, decouple=decouple, fused=fused
    )
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    expected = written_out(values, gradients, 1e-2, betas, 1e-6, exponent, 0.1, decouple)
    torch.testing.assert_close(p.detach(), expected.pop("theta"), rtol=1e-12, atol=1e-12)
    for name, value in expected.items():
        torch.testing.assert_close(optimizer.state[p][name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
def test_the_first_step_moves_nothing(fused, cautious):
    p = torch.tensor([1.0, -0.3], requires_grad=True)
    p.grad = torch.tensor([5.0, 5.0])
    ADOPT([p], lr=0.1, weight_decay=0.5, decouple=True, cautious=cautious, fused=fused).step()
    assert p.tolist() == torch.tensor([1.0, -0.3]).tolist()


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
def test_cautious_decay_acts_where_the_update_does(fused):
    p = torch.tensor([1.0, -1.0, 1.0], requires_grad=True)
    optimizer = ADOPT([p], lr=0.1, betas=(0.0, 0.9), weight_decay=1.0, decouple=True, cautious=True, fused=fused)
    for _ in range(2):
        p.grad = torch.tensor([1.0, 1.0, -1.0])
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.8, -1.1, 1.1]))
