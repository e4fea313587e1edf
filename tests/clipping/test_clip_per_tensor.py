# SPDX-License-Identifier: Apache-2.0
"""ClipPerTensor in the step, and called, against torch's clip of one parameter at a time."""

import math

import pytest
import torch

from lightning_optkit.clipping import ClipPerTensor
from lightning_optkit.optimizers import SGD


def test_folded_it_is_the_function_and_torchs_step(folded_and_called):
    ours, optimizer, theirs, _ = folded_and_called(ClipPerTensor(2.0), (1.0, 1e-3, 1e6, 0.0, 0.02))
    torch.testing.assert_close([p.double() for p in ours], theirs, rtol=1e-12, atol=1e-12)
    # 500 x 40 numbers of size 0.02 have norm 2.83; at 1e-3 and 0 nothing is long.
    assert (optimizer.num_steps, optimizer.num_clipped) == (5, 3)


def test_squares_that_overflow_fp32_are_clipped_and_not_taken_for_infinite(folded_and_called):
    ours, optimizer, theirs, _ = folded_and_called(ClipPerTensor(2.0), (1e30,), dtype=torch.float32)
    torch.testing.assert_close([p.double() for p in ours], theirs, rtol=2e-6, atol=2e-6)
    assert optimizer.num_skipped == 0


def test_the_function_is_torchs_clip_of_each_parameter():
    torch.manual_seed(0)
    params = [torch.randn(shape, requires_grad=True) for shape in ((), (5, 7), (100,))]
    copies = [p.detach().clone() for p in params]
    for p, q in zip(params, copies, strict=True):
        p.grad = 3 * torch.randn(p.shape)
        q.grad = p.grad.clone()
    norm = ClipPerTensor(1.5)(params)
    assert norm == pytest.approx(float(torch.nn.utils.get_total_norm([q.grad for q in copies])))
    for p, q in zip(params, copies, strict=True):
        torch.nn.utils.clip_grad_norm_([q], 1.5)
        torch.testing.assert_close(p.grad, q.grad)


def test_one_parameter_and_none_without_gradient():
    p = torch.zeros(2, requires_grad=True)
    assert ClipPerTensor(1.0)(p) == 0
    p.grad = torch.tensor([3.0, 4.0])
    assert ClipPerTensor(1.0)(p) == 5


def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(fused):
    p, q = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = SGD([p, q], lr=1.0, clip=ClipPerTensor(1.0), fused=fused)
    p.grad, q.grad = torch.ones(3), torch.tensor([1.0, math.inf, 1.0])
    optimizer.step()
    assert p.tolist() == q.tolist() == [1.0, 1.0, 1.0]
    assert (optimizer.num_steps, optimizer.num_skipped) == (0, 1)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.inf, math.nan])
def test_refuses_a_norm_out_of_range(max_norm):
    with pytest.raises(ValueError, match=r"^ClipPerTensor\(max_norm=.*\): max_norm must be in \(0, inf\)\.$"):
        ClipPerTensor(max_norm)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-12, 1.0, 1e12, 1e20, 1e30])
@pytest.mark.parametrize("max_norm", [1e-6, 1.0, 1e25])
def test_any_scale_in_single_precision_folded_and_called(size, max_norm, fused):
    torch.manual_seed(0)
    grads = [torch.randn(shape) * size for shape in ((5, 7), (3000,), ())]
    ours, called = ([torch.zeros_like(g, requires_grad=True) for g in grads] for _ in range(2))
    for p, q, g in zip(ours, called, grads, strict=True):
        p.grad, q.grad = g.clone(), g.clone()
    optimizer = SGD(ours, lr=1.0, clip=ClipPerTensor(max_norm), fused=fused)
    optimizer.step()
    norm = ClipPerTensor(max_norm)(called)
    total = torch.cat([g.double().flatten() for g in grads]).norm().item()
    assert norm.item() == pytest.approx(total, rel=1e-6) and optimizer.grad_norm == pytest.approx(total, rel=1e-6)
    for p, q, g in zip(ours, called, grads, strict=True):
        expected = g.double() * min(1.0, max_norm / (g.double().norm().item() + 1e-6))
        torch.testing.assert_close(-p.detach().double(), expected, rtol=1e-5, atol=1e-38)
        torch.testing.assert_close(q.grad.double(), expected, rtol=1e-5, atol=1e-38)
