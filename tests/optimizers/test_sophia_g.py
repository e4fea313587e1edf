# SPDX-License-Identifier: Apache-2.0
"""Sophia-G against an explicit implementation (Liu et al. 2023, Algorithms 2 and 3)."""

import io

import pytest
import torch

from lightning_optkit.optimizers import SophiaG

PATHS = pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
SAMPLES, EVERY = 12, 7


def written_out(values, gradients, sampled, lr, betas, rho, decay):
    """theta, m and h; `sampled` are the gradients of the loss over drawn labels, one every `EVERY` steps."""
    theta = values.clone()
    m, h = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, g in enumerate(gradients):
        if t % EVERY == 0:
            h = betas[1] * h + (1 - betas[1]) * SAMPLES * sampled[t // EVERY] ** 2
        m = betas[0] * m + (1 - betas[0]) * g
        theta = theta - lr * decay * theta
        theta = theta - lr * (m / (rho * h).clamp(min=1e-15)).clamp(-1, 1)
    return theta, m, h


def train(optimizer, p, gradients, sampled, first=0):
    for t, g in enumerate(gradients, start=first):
        if t % EVERY == 0:
            p.grad = sampled[t // EVERY].clone()
            optimizer.update_hessian(SAMPLES)
        p.grad = g.clone()
        optimizer.step()


@PATHS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-5)], ids=str)
@pytest.mark.parametrize("rho", [0.02, 0.3])  # most elements are clipped, most are not
@pytest.mark.parametrize("shape", [(), (7,), (16, 33)], ids=str)
def test_follows_the_algorithm_of_the_paper(shape, rho, dtype, tolerance, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(shape, dtype=dtype), torch.randn(200, *shape, dtype=dtype)
    sampled = torch.randn(200, *shape, dtype=dtype)
    p = values.clone().requires_grad_()
    optimizer = SophiaG([p], lr=3e-3, betas=(0.9, 0.8), rho=rho, weight_decay=0.2, fused=fused)
    train(optimizer, p, gradients, sampled)
    theta, m, h = written_out(values.double(), gradients.double(), sampled.double(), 3e-3, (0.9, 0.8), rho, 0.2)
    torch.testing.assert_close(p.detach().double(), theta, rtol=0, atol=tolerance)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), m, rtol=0, atol=tolerance)
    torch.testing.assert_close(optimizer.state[p]["hessian"].double(), h, rtol=tolerance, atol=tolerance)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("stop", [0, 10])
def test_estimates_are_saved_and_a_run_resumes_bit_for_bit(stop, state_dtype, dtype, fused, frozen):
    torch.manual_seed(0)
    values, gradients, sampled = torch.randn(40).to(dtype), torch.randn(20, 40).to(dtype), torch.randn(20, 40).to(dtype)
    straight, stopped = values.clone().requires_grad_(), values.clone().requires_grad_()
    made = dict(lr=1e-2, rho=0.1, state_dtype=state_dtype, fused=fused)
    optimizer, first = SophiaG([straight], **made), SophiaG([stopped], **made)
    train(optimizer, straight, gradients, sampled)
    train(first, stopped, gradients[:stop], sampled)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    resumed = stopped.detach().clone().requires_grad_()
    second = SophiaG([resumed], **made)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    train(second, resumed, gradients[stop:], sampled, first=stop)
    assert frozen(resumed) == frozen(straight)
    assert frozen(second.state_dict()["state"]) == frozen(optimizer.state_dict()["state"])


def test_an_estimate_before_the_first_step_is_saved():
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    optimizer, other = SophiaG([p], betas=(0.9, 0.5)), SophiaG([p])
    optimizer.update_hessian(4)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[p]["hessian"].tolist() == [2.0, 2.0, 2.0]


@PATHS
def test_a_step_leaves_the_estimate_alone(fused):
    p = torch.ones(70, requires_grad=True)
    optimizer = SophiaG([p], state_dtype="int8", fused=fused)
    p.grad = torch.arange(70.0)
    optimizer.update_hessian(3)
    estimate = optimizer.state[p]["hessian"].clone()
    for _ in range(5):
        optimizer.step()
    assert torch.equal(optimizer.state[p]["hessian"], estimate)


def test_an_estimate_of_half_precision_gradients_is_in_single_precision():
    p = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.tensor([1e-3, 2.0]).bfloat16()
    optimizer = SophiaG([p], betas=(0.9, 0.999))
    optimizer.update_hessian(1)
    expected = 0.001 * p.grad.double() ** 2
    torch.testing.assert_close(optimizer.state[p]["hessian"].double(), expected, rtol=1e-6, atol=0)


def test_a_number_of_samples_below_1_is_refused():
    with pytest.raises(ValueError, match=r"^SophiaG\.update_hessian\(num_samples=0\): num_samples must be an integer"):
        SophiaG([torch.ones(2, requires_grad=True)]).update_hessian(0)
