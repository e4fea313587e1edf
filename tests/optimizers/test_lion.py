# SPDX-License-Identifier: Apache-2.0
"""Lion against an explicit implementation (Chen et al. 2023, Algorithm 2)."""

import pytest
import torch

from lightning_optkit.optimizers import Lion


def written_out(values, gradients, lr, beta1, beta2, decay):
    """theta and m of the paper, in fp64; `decay` is its lambda."""
    theta, m = values.double().clone(), torch.zeros_like(values, dtype=torch.float64)
    for g in gradients:
        c = beta1 * m + (1 - beta1) * g.double()
        theta = theta - lr * (c.sign() + decay * theta)
        m = beta2 * m + (1 - beta2) * g.double()
    return theta, m


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98)], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (16, 33)], ids=str)
def test_follows_the_algorithm_of_the_paper(shape, betas, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(shape, dtype=torch.float64), torch.randn(30, *shape, dtype=torch.float64)
    p = values.clone().requires_grad_()
    optimizer = Lion([p], lr=1e-2, betas=betas, weight_decay=0.1, fused=fused)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    theta, m = written_out(values, gradients, 1e-2, *betas, 0.1)
    torch.testing.assert_close(p.detach(), theta, rtol=0, atol=1e-13)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], m, rtol=0, atol=1e-13)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_zero_gradient_moves_nothing_and_a_nan_is_seen(dtype, fused):
    p = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=dtype, requires_grad=True)
    p.grad = torch.tensor([0.0, float("nan"), float("inf"), float("-inf")], dtype=dtype)
    Lion([p], lr=0.5, weight_decay=0, fused=fused).step()
    torch.testing.assert_close(p.detach(), torch.tensor([1.0, float("nan"), 2.5, 4.5], dtype=dtype), equal_nan=True)


def test_ascends_when_asked_to():
    p = torch.tensor([1.0], requires_grad=True)
    p.grad = torch.tensor([1.0])
    Lion([p], lr=0.25, maximize=True).step()
    assert p.item() == 1.25
