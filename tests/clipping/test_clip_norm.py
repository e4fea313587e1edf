# SPDX-License-Identifier: Apache-2.0
"""ClipNorm in the step, against torch.nn.utils.clip_grad_norm_ before a step of torch.optim."""

import dataclasses
import math

import pytest
import torch

from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import SGD, AdamW
from lightning_optkit.step import ClipBounds

PATHS = pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
SHAPES = [(), (5, 7), (16411,)]


def parameters(dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in SHAPES]


def give_gradients(ours, theirs, seed, size):
    generator = torch.Generator().manual_seed(seed)
    for p, q in zip(ours, theirs, strict=True):
        grad = size * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = grad.to(p.dtype)
        q.grad = p.grad.to(q.dtype).clone()


@PATHS
@pytest.mark.parametrize(
    ("ours_class", "_torch_class", "kwargs"),
    [
        (SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.1)),
        (AdamW, torch.optim.AdamW, dict(lr=0.1, maximize=True)),
    ],
    ids=["sgd", "adamw"],
)
def test_folded_it_is_torchs_clip_and_step(ours_class, _torch_class, kwargs, fused):
    ours, theirs = parameters(), parameters()
    optimizers = [ours_class(ours, clip=ClipNorm(2.0), fused=fused, **kwargs), _torch_class(theirs, **kwargs)]
    for step, size in enumerate((1.0, 1e-3, 1e6, 0.0, 1e-9, 0.02)):
        give_gradients(ours, theirs, step, size)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 2.0)
        for optimizer in optimizers:
            optimizer.step()
        assert optimizers[0].grad_norm == pytest.approx(norm.item(), rel=1e-12)
        assert optimizers[0].grad_norm_clipped == pytest.approx(
            torch.nn.utils.get_total_norm([q.grad for q in theirs]).item(), rel=1e-12
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert (optimizers[0].num_steps, optimizers[0].num_clipped) == (6, 3)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_whose_squares_overflow_fp32_are_clipped_and_not_taken_for_infinite(dtype, fused):
    ours = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in SHAPES]
    theirs = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
    optimizers = [SGD(ours, lr=1.0, clip=ClipNorm(2.0), fused=fused), torch.optim.SGD(theirs, lr=1.0)]
    give_gradients(ours, theirs, seed=0, size=1e30)
    norm = torch.nn.utils.clip_grad_norm_(theirs, 2.0)
    for optimizer in optimizers:
        optimizer.step()
    assert optimizers[0].num_skipped == 0
    assert optimizers[0].grad_norm == pytest.approx(norm.item(), rel=1e-6)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=torch.finfo(dtype).eps, atol=1e-9)


@PATHS
def test_the_norm_is_over_all_dtypes_and_paths_together(fused):
    gapped = torch.zeros(4, 2)[:, 0].detach().requires_grad_()
    params = [torch.zeros(4, dtype=d, requires_grad=True) for d in (torch.float64, torch.float32, torch.bfloat16)]
    params.append(gapped)
    for p in params:
        p.grad = torch.full_like(p, 4.0)
    optimizer = SGD(params, lr=1.0, clip=ClipNorm(4.0), fused=fused)
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(16.0, rel=1e-12)
    for p in params:
        assert p.double().tolist() == pytest.approx([-1.0] * 4, abs=1e-6)


def test_called_it_is_torchs_function():
    ours, theirs = parameters(), parameters()
    give_gradients(ours, theirs, seed=0, size=1.0)
    norm = ClipNorm(0.5)(ours)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    assert norm.shape == ()
    torch.testing.assert_close(norm, expected, rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in ours], [q.grad for q in theirs], rtol=0, atol=0)


@PATHS
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-15, 1e-12, 1.0, 1e12, 1e20, 1e30])
def test_any_scale_of_the_gradients_in_single_precision_folded_and_called(size, fused):
    ours, called, theirs = parameters(torch.float32), parameters(torch.float32), parameters()
    optimizer = SGD(ours, lr=1.0, clip=ClipNorm(2.0), fused=fused)
    give_gradients(ours, theirs, seed=0, size=size)
    give_gradients(called, theirs, seed=0, size=size)
    norm, expected = ClipNorm(2.0)(called), torch.nn.utils.clip_grad_norm_(theirs, 2.0)
    before = [p.detach().clone() for p in ours]
    optimizer.step()
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(expected.item(), rel=1e-6)
    assert optimizer.grad_norm == pytest.approx(expected.item(), rel=1e-6)
    for p, start, q, r in zip(ours, before, called, theirs, strict=True):
        torch.testing.assert_close(q.grad.double(), r.grad, rtol=1e-6, atol=0)
        torch.testing.assert_close((start - p).double(), r.grad, rtol=1e-5, atol=1e-6)


def test_a_small_norm_is_left_exactly_as_it_is(frozen):
    trained = []
    for clip in (None, ClipNorm(1e9)):
        params = parameters(torch.float32)
        give_gradients(params, params, seed=0, size=1.0)
        AdamW(params, clip=clip).step()
        trained.append(frozen(params))
    assert trained[0] == trained[1]


def test_bounds_the_global_norm_and_no_part_by_itself():
    assert ClipNorm(2.0).needs_norm
    assert ClipNorm(2.0).norm_bound(torch.tensor(1e9)) == 2.0
    assert ClipNorm(2.0).bounds == ClipBounds()


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.inf, math.nan])
def test_refuses_a_norm_out_of_range(max_norm):
    with pytest.raises(ValueError, match=r"^ClipNorm\(max_norm=.*\): max_norm must be in \(0, inf\)\.$"):
        ClipNorm(max_norm)


def test_refuses_what_is_no_number():
    with pytest.raises(TypeError, match=r"^ClipNorm\(max_norm='1'\): max_norm must be a number"):
        ClipNorm("1")


def test_cannot_be_changed_under_the_optimizer_that_holds_it():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ClipNorm(1.0).max_norm = 2.0


@pytest.mark.parametrize("scale", [1e-5, 1e-6, 1e-8])
def test_a_bound_near_the_constant_of_torch_has_torchs_result(scale, fused):
    grad = torch.tensor([0.9, -0.3], dtype=torch.float64) * scale
    p, q, r = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    p.grad, q.grad, r.grad = grad.clone(), grad.clone(), grad.clone()
    SGD([p], lr=1.0, clip=ClipNorm(scale), fused=fused).step()
    ClipNorm(scale)([q])
    torch.nn.utils.clip_grad_norm_([r], scale)
    torch.testing.assert_close(-p.detach() / scale, r.grad / scale, rtol=1e-12, atol=0)
    torch.testing.assert_close(q.grad / scale, r.grad / scale, rtol=1e-12, atol=0)
    assert r.grad.norm() < 0.96 * grad.norm()
