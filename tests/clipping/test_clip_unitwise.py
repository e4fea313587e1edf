# SPDX-License-Identifier: Apache-2.0
"""ClipUnitwise in the step, and called, against an explicit equation 3 of the paper."""

import math

import pytest
import torch

from lightning_optkit._native import extension
from lightning_optkit.clipping import ClipUnitwise
from lightning_optkit.optimizers import SGD


def written_out(weight, grad, ratio, eps):
    """Equation 3, unit by unit."""
    rows, grads = (weight, grad.clone()) if weight.ndim > 1 else (weight[None], grad.clone()[None])
    for w, g in zip(rows, grads, strict=True):
        limit = ratio * max(float(w.norm()), eps)
        if float(g.norm()) > limit:
            g *= limit / float(g.norm())
    return grads.reshape(grad.shape)


@pytest.mark.parametrize("shape", [(), (4,), (5, 7), (3, 2, 4), (4, 3, 3, 3), (2, 20000)], ids=str)
def test_the_function_is_the_equation(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight.grad = 0.1 * torch.randn(shape, dtype=torch.float64)
    expected = written_out(weight.detach(), weight.grad, 0.09, 1e-3)
    assert ClipUnitwise(0.09)([weight]) == pytest.approx(float(weight.grad.norm()), rel=0.5)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=0)


def test_folded_it_is_the_function_and_torchs_step(folded_and_called):
    ours, optimizer, theirs, _ = folded_and_called(ClipUnitwise(0.5), (1.0, 1e-3, 1e6, 0.0, 0.49))
    torch.testing.assert_close([p.double() for p in ours], theirs, rtol=1e-12, atol=1e-12)
    assert (optimizer.num_steps, optimizer.num_clipped) == (5, 3)


def test_squares_that_overflow_fp32_are_clipped_and_not_taken_for_infinite(folded_and_called):
    ours, optimizer, theirs, _ = folded_and_called(ClipUnitwise(0.5), (1e30,), dtype=torch.float32)
    torch.testing.assert_close([p.double() for p in ours], theirs, rtol=2e-6, atol=2e-6)
    assert optimizer.num_skipped == 0


def test_a_unit_of_zeros_can_grow(fused):
    p = torch.zeros(2, 4, requires_grad=True)
    optimizer = SGD([p], lr=1.0, clip=ClipUnitwise(0.1, eps=0.01), fused=fused)
    p.grad = torch.tensor([[2.0] * 4, [0.0] * 4])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([[-0.0005] * 4, [0.0] * 4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_compiled_step_is_the_reference_step_over_layouts(dtype):
    torch.manual_seed(0)
    shapes = [(7, 33), (5, 3, 3, 3), (1, 50000), (300, 64)]
    values = [torch.randn(shape).to(dtype) for shape in shapes]
    values[1] = values[1].to(memory_format=torch.channels_last)
    values.append(torch.randn(9, 4).to(dtype).t())  # its first dimension is not outermost
    grads = [0.1 * torch.randn(v.shape).to(dtype) for v in values]
    results = []
    for fused in (None, False):
        params = [v.clone().requires_grad_() for v in values]
        optimizer = SGD(params, lr=0.5, momentum=0.5, clip=ClipUnitwise(0.05), centralize=True, fused=fused)
        for _ in range(3):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
        results.append(params)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 3 * 2**-6, torch.float16: 3 * 2**-9}[dtype]
    torch.testing.assert_close(*results, rtol=0, atol=tolerance)
    if extension is not None:
        paths = [plan.path for plan in SGD(params, clip=ClipUnitwise(0.1)).explain().groups]
        assert paths[1] == "reference: its first dimension is not outermost in memory"


def test_the_bits_do_not_depend_on_the_number_of_threads(threads):
    results = []
    for count in (1, 2):
        threads(count)
        torch.manual_seed(0)
        p = torch.randn(300, 517, requires_grad=True)
        optimizer = SGD([p], lr=0.1, clip=ClipUnitwise(0.01), centralize=True)
        p.grad = torch.randn(300, 517)
        optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize(("name", "value"), [("ratio", 0.0), ("ratio", math.inf), ("eps", 0.0), ("eps", math.nan)])
def test_refuses_arguments_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"^ClipUnitwise\({name}=.*\): {name} must be in \(0, inf\)\.$"):
        ClipUnitwise(**{name: value})


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-12, 1.0, 1e12, 1e20, 1e30])
@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1.0, 1e10, 1e25])
def test_any_scale_in_single_precision_folded_and_called(scale, size, fused):
    torch.manual_seed(0)
    rows = torch.tensor([[1.0], [0.0], [1e-8], [1e5]])  # a unit of zeros, and units of other scales beside it
    weight, grad = torch.randn(4, 3000) * scale * rows, torch.randn(4, 3000) * size
    p, q = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    p.grad, q.grad = grad.clone(), grad.clone()
    optimizer = SGD([p], lr=1.0, clip=ClipUnitwise(0.1), fused=fused)
    optimizer.step()
    ClipUnitwise(0.1)([q])
    expected = written_out(weight.double(), grad.double(), 0.1, 1e-3)
    torch.testing.assert_close(q.grad.double(), expected, rtol=1e-5, atol=0)
    moved = weight.double() - expected
    torch.testing.assert_close(p.detach().double(), moved, rtol=1e-4, atol=1e-6 * float(moved.abs().max()))


@pytest.mark.parametrize("size", [1e30, 3e37])
def test_the_mean_of_large_gradients_is_taken_off(size, fused):
    grad = torch.linspace(0.5, 1.5, 5000).repeat(2, 1) * size
    p = torch.zeros(2, 5000, requires_grad=True)
    p.grad = grad.clone()
    SGD([p], lr=1.0, centralize=True, fused=fused).step()
    expected = grad.double().mean(1, keepdim=True) - grad.double()
    torch.testing.assert_close(p.detach().double() / size, expected / size, rtol=1e-5, atol=1e-6)
