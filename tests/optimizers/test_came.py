# SPDX-License-Identifier: Apache-2.0
"""CAME against an explicit implementation (Luo et al. 2023, Algorithm 2)."""

import pytest
import torch

from lightning_optkit.optimizers import CAME


def written_out(values, gradients, lr, betas, eps, threshold, decay):
    """theta, m and the factors R, C (of the squares) and R', C' (of the residuals S)."""
    b1, b2, b3 = betas
    theta, m = values.clone(), torch.zeros_like(values)
    v = torch.zeros_like(values)
    r = c = r_s = c_s = 0.0
    for g in gradients:
        if values.ndim < 2:
            v = b2 * v + (1 - b2) * (g**2 + eps[0])
            u = g / v.sqrt()
        else:
            r = b2 * r + (1 - b2) * (g**2 + eps[0]).mean(-1, keepdim=True)
            c = b2 * c + (1 - b2) * (g**2 + eps[0]).mean(-2, keepdim=True)
            u = g / (r @ c / r.mean(-2, keepdim=True)).sqrt()
        u = u / max(1.0, float((u**2).mean().sqrt()) / threshold)
        m = b1 * m + (1 - b1) * u
        step = m
        if values.ndim > 1:
            s = (u - m) ** 2 + eps[1]
            r_s = b3 * r_s + (1 - b3) * s.mean(-1, keepdim=True)
            c_s = b3 * c_s + (1 - b3) * s.mean(-2, keepdim=True)
            step = m / (r_s @ c_s / r_s.mean(-2, keepdim=True)).sqrt()
        theta = theta - lr * decay * theta - lr * step
    return theta, m


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 5e-5)], ids=str)
@pytest.mark.parametrize(("betas", "threshold"), [((0.8, 0.95, 0.99), 0.5), ((0.9, 0.999, 0.9999), 1.0)], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (16, 33), (3, 5, 4)], ids=str)
def test_follows_the_algorithm_of_the_paper_over_200_steps(shape, betas, threshold, dtype, tolerance):
    torch.manual_seed(0)
    values, gradients = torch.randn(shape, dtype=dtype), torch.randn(200, *shape, dtype=dtype)
    p = values.clone().requires_grad_()
    given = dict(lr=1e-3, betas=betas, eps=(1e-20, 1e-12), clip_threshold=threshold, weight_decay=0.2)
    optimizer = CAME([p], **given)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    theta, m = written_out(values.double(), gradients.double(), *given.values())
    torch.testing.assert_close(p.detach().double(), theta, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), m, rtol=tolerance, atol=tolerance)


def test_momentum_that_agrees_with_the_updates_takes_larger_steps():
    steady, noisy = (torch.zeros(4, 4, requires_grad=True) for _ in range(2))
    optimizer = CAME([steady, noisy], lr=1e-3, betas=(0.9, 0.9, 0.9))
    torch.manual_seed(0)
    for _ in range(30):
        steady.grad, noisy.grad = torch.ones(4, 4) + 0.1 * torch.randn(4, 4), torch.ones(4, 4) + torch.randn(4, 4)
        optimizer.step()
    assert steady.mean() < 2 * noisy.mean() < 0


def test_complex_parameters_are_refused_and_a_parameter_of_no_elements_stays():
    with pytest.raises(ValueError, match=r"^CAME\(params=\.\.\.\): every parameter must be real, not complex\.$"):
        CAME([torch.ones(2, dtype=torch.complex64, requires_grad=True)])
    empty = torch.ones(0, 3, requires_grad=True)
    optimizer = CAME([empty])
    empty.grad = torch.ones(0, 3)
    optimizer.step()
    assert empty.shape == (0, 3)


def test_says_that_it_runs_in_pytorch():
    (plan,) = CAME([torch.ones(2, 3, requires_grad=True)]).explain().groups
    assert plan.path == "reference: no kernel for two factored averages"
