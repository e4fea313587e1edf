# SPDX-License-Identifier: Apache-2.0
"""Signum against an explicit implementation (Bernstein et al. 2018, Algorithm 2)."""

import pytest
import torch

from lightning_optkit.optimizers import Signum

PATHS = pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])


def written_out(values, gradients, lr, beta, decay):
    x, m = values.clone(), torch.zeros_like(values)
    for g in gradients:
        m = beta * m + (1 - beta) * g
        x = x - lr * (m.sign() + decay * x)
    return x, m


@PATHS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("shape", [(), (7,), (16, 33)], ids=str)
def test_follows_the_algorithm_of_the_paper(shape, momentum, dtype, tolerance, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(shape, dtype=dtype), torch.randn(200, *shape, dtype=dtype)
    p = values.clone().requires_grad_()
    optimizer = Signum([p], lr=3e-3, momentum=momentum, weight_decay=0.2, fused=fused)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    x, m = written_out(values.double(), gradients.double(), 3e-3, momentum, 0.2)
    torch.testing.assert_close(p.detach().double(), x, rtol=0, atol=tolerance)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), m, rtol=0, atol=tolerance)


@PATHS
def test_zero_stays_and_nan_is_seen(fused):
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.tensor([0.0, float("nan"), -2.0])
    Signum([p], lr=0.5, fused=fused).step()
    torch.testing.assert_close(p.detach(), torch.tensor([1.0, float("nan"), 1.5]), equal_nan=True)


def test_differs_from_lion_where_the_newest_gradient_does_not_turn_the_momentum():
    p = torch.zeros(1, requires_grad=True)
    optimizer = Signum([p], lr=1.0, momentum=0.9)
    for g in (1.0, -0.5):
        p.grad = torch.tensor([g])
        optimizer.step()
    assert p.item() == -2.0  # 0.9 * 0.1 - 0.1 * 0.5 > 0
