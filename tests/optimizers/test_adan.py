# SPDX-License-Identifier: Apache-2.0
"""Adan against its algorithm written out (Xie et al. 2022, Algorithm 1), and on real data."""

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


def build(params, **kwargs):
    return Adan(params, lr=1e-2, weight_decay=0.1, **kwargs)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, dict(rtol=1e-12, atol=1e-12)),
        (torch.float32, dict(rtol=1e-5, atol=1e-5)),
        (torch.bfloat16, dict(rtol=0.02, atol=0.01)),
    ],
    ids=str,
)
def test_both_paths_agree_with_a_clip_and_an_average(paths_agree, dtype, tolerance):
    paths_agree(build, dtype, **tolerance)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stages", [dict(rounding="kahan"), dict(rounding="stochastic"), dict(l1=0.1)], ids=str)
def test_both_paths_agree_with_other_stages(paths_agree, stages, state_dtype):
    paths_agree(
        lambda params, **kwargs: build(params, state_dtype=state_dtype, **stages, **kwargs),
        torch.bfloat16,
        rtol=0.05,
        atol=0.05,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
def test_resumes_bit_for_bit(resumes, dtype, fused):
    resumes(lambda params: build(params, fused=fused), dtype)


def test_ascends_when_asked_to():
    up, down = torch.tensor([1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    one, other = Adan([up], lr=0.1, maximize=True), Adan([down], lr=0.1)
    for _ in range(3):
        up.grad, down.grad = torch.tensor([2.0]), torch.tensor([-2.0])
        one.step()
        other.step()
    assert up.item() == down.item() > 1.0


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


def test_follows_it_in_single_precision_to_rounding():
    torch.manual_seed(0)
    values, gradients = torch.randn(300, dtype=torch.float64), torch.randn(50, 300, dtype=torch.float64)
    p, q = values.float().requires_grad_(), values.float().double().requires_grad_()
    optimizers = [build([p]), build([q])]
    for g in gradients.float():
        p.grad, q.grad = g, g.double()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(p.detach().double(), q.detach(), rtol=2e-6, atol=2e-6)


def test_cautious_decay_acts_where_the_update_does():
    p = torch.tensor([1.0, -1.0, 1.0], requires_grad=True)
    p.grad = torch.tensor([1.0, 1.0, -1.0])
    Adan([p], lr=0.1, weight_decay=1.0, no_prox=True, cautious=True).step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.8, -1.1, 1.1]))


def test_learns_the_digits(digits_loss):
    loss = digits_loss(lambda params: Adan(params, lr=1e-2, weight_decay=0.02))
    assert loss < 0.15  # 0.136 when this was written


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(lr=-1.0), r"^Adan\(lr=-1\.0\): lr must be in \[0, inf\)\.$"),
        (dict(betas=(0.9, 0.9)), r"^Adan\(betas=\(0\.9, 0\.9\)\): betas must be three numbers\.$"),
        (dict(betas=(0.9, 0.9, 1.0)), r"^Adan\(betas\[2\]=1\.0\): betas\[2\] must be in \[0, 1\)\.$"),
        (dict(eps=-1.0), r"^Adan\(eps=-1\.0\): eps must be in \[0, inf\)\.$"),
        (dict(no_prox=1), r"^Adan\(no_prox=1\): no_prox must be one of"),
        (dict(cautious=True), r"^Adan\(cautious=True\): needs no_prox=True; the proximal decay acts everywhere\.$"),
    ],
    ids=str,
)
def test_refuses_in_one_sentence(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Adan([torch.ones(1, requires_grad=True)], **kwargs)
