# SPDX-License-Identifier: Apache-2.0
"""The statistics of the step: against torch computations, and the updates lost in 16 bits."""

import math

import pytest
import torch

from lightning_optkit.clipping import ClipNorm, ClipValue
from lightning_optkit.optimizers import SGD, AdamW
from lightning_optkit.step import TensorStatistics

PATHS = pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6}  # relative; sums are in fp32 or fp64


@PATHS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (40_001,), (0,)], ids=str)
def test_counts_what_torch_computes(shape, dtype, fused):
    torch.manual_seed(0)
    p = torch.randn(shape).to(dtype).requires_grad_()
    p.grad = torch.randn(shape).to(dtype)
    grad, before = 0.5 * p.grad.double(), p.detach().double().clone()
    optimizer = SGD([p], lr=0.1, weight_decay=0.3, clip=ClipValue(0.4), statistics=True, fused=fused)
    optimizer.grad_scale = torch.tensor(2.0)
    optimizer.step()

    grad = grad.clamp(-0.4, 0.4) + 0.3 * before
    after = before - 0.1 * grad
    (counted,) = optimizer.statistics()
    assert counted.grad_norm == pytest.approx(grad.norm().item(), rel=TOLERANCE[dtype])
    assert counted.param_norm == pytest.approx(after.norm().item(), rel=TOLERANCE[dtype])
    assert counted.update_norm == pytest.approx((after - before).norm().item(), rel=10 * TOLERANCE[dtype])
    assert (counted.nonfinite, counted.grad_sq) == (0, pytest.approx(counted.grad_norm**2))


@PATHS
def test_the_update_includes_decoupled_decay(fused):
    p = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    p.grad = torch.zeros_like(p)
    optimizer = AdamW([p], lr=0.1, weight_decay=0.5, statistics=True, fused=fused)
    optimizer.step()
    assert optimizer.statistics()[0].update_norm == pytest.approx(0.1)


@PATHS
def test_counts_elements_of_the_gradient_that_are_not_finite(fused):
    p = torch.ones(40_000, requires_grad=True)
    p.grad = torch.ones(40_000)
    p.grad[[0, 5, 17_000, 39_999]] = torch.tensor([math.inf, math.nan, -math.inf, math.nan])
    optimizer = SGD([p], statistics=True, fused=fused)
    optimizer.step()
    assert optimizer.statistics()[0].nonfinite == 4


def train_at_a_small_rate(dtype, rounding, fused, steps=200):
    """Parameters of 1 that should reach 1 - steps * 3e-4; half the spacing of bf16 is 2e-3."""
    p = torch.ones(4000, dtype=dtype, requires_grad=True)
    p.grad = torch.ones(4000, dtype=dtype)
    optimizer = AdamW([p], lr=3e-4, weight_decay=0.0, rounding=rounding, statistics=True, fused=fused)
    lost = []
    for _ in range(steps):
        optimizer.step()
        lost.append(optimizer.statistics()[0].lost)
    return p.detach().double().mean().item(), lost


@PATHS
def test_bf16_loses_whole_updates_and_the_count_says_so(fused):
    mean, lost = train_at_a_small_rate(torch.bfloat16, "nearest", fused)
    assert mean == 1.0
    assert lost == [4000] * 200


@PATHS
def test_stochastic_rounding_loses_none_on_average(fused):
    mean, lost = train_at_a_small_rate(torch.bfloat16, "stochastic", fused)
    assert mean == pytest.approx(1 - 200 * 3e-4, abs=1e-3)
    # Below 1 bf16 numbers are 2^-8 apart, so that an update of 3e-4 moves 3e-4 * 2^8 of them.
    assert sum(lost[1:]) / (199 * 4000) == pytest.approx(1 - 3e-4 * 2**8, abs=0.01)


@PATHS
def test_kahan_summation_loses_none(fused):
    mean, lost = train_at_a_small_rate(torch.bfloat16, "kahan", fused)
    assert mean == pytest.approx(1 - 200 * 3e-4, abs=2**-9)
    assert lost == [0] * 200


@PATHS
def test_fp32_loses_none(fused):
    mean, lost = train_at_a_small_rate(torch.float32, "nearest", fused)
    assert mean == pytest.approx(1 - 200 * 3e-4, abs=1e-5)
    assert lost == [0] * 200


@PATHS
def test_an_update_of_zero_is_not_lost(fused):
    p = torch.ones(5, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.tensor([0.0, 0.0, 1e-6, 1.0, 0.0], dtype=torch.bfloat16)
    optimizer = SGD([p], lr=0.1, statistics=True, fused=fused)
    optimizer.step()
    assert optimizer.statistics()[0].lost == 1


@PATHS
def test_comes_in_the_order_of_the_groups_with_none_where_no_gradient_was(fused):
    params = [torch.full((2,), float(n), dtype=torch.float64, requires_grad=True) for n in range(4)]
    optimizer = SGD([dict(params=params[2:]), dict(params=params[:2])], lr=0.0, statistics=True, fused=fused)
    for missing in (None, 0, 3):
        for n, p in enumerate(params):
            p.grad = None if n == missing else torch.ones_like(p)
        optimizer.step()
        expected = [None if n == missing else n * math.sqrt(2) for n in (2, 3, 0, 1)]
        assert [s and s.param_norm for s in optimizer.statistics()] == [
            None if e is None else pytest.approx(e) for e in expected
        ]


@PATHS
def test_a_step_without_any_gradient_counted_nothing(fused):
    params = [torch.ones(2, requires_grad=True) for _ in range(2)]
    optimizer = SGD(params, statistics=True, fused=fused)
    params[0].grad = torch.ones(2)
    optimizer.step()
    params[0].grad = None
    optimizer.step()
    assert optimizer.statistics() == [None, None]


@PATHS
@pytest.mark.parametrize("reason", ["found_inf", "clip"])
def test_can_be_asked_after_a_first_step_that_was_skipped(reason, fused):
    p = torch.ones(2, requires_grad=True)
    p.grad = torch.tensor([1.0, math.inf])
    optimizer = SGD([p], clip=ClipNorm(1.0) if reason == "clip" else None, statistics=True, fused=fused)
    if reason == "found_inf":
        optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    (counted,) = optimizer.statistics()
    assert counted is None or counted.update_sq == 0


def test_compiled_and_plain_pytorch_count_the_same():
    counted = []
    for fused in (None, False):
        torch.manual_seed(0)
        params = [
            torch.randn(n).to(dtype).requires_grad_() for n in (5, 40_000) for dtype in (torch.float32, torch.half)
        ]
        for p in params:
            p.grad = torch.randn(p.shape).to(p.dtype)
        optimizer = AdamW(params, lr=1e-4, clip=ClipNorm(1.0), l1=1e-3, statistics=True, fused=fused)
        optimizer.step()
        counted.append(optimizer.statistics())
    for ours, reference in zip(*counted, strict=True):
        assert ours.grad_sq == pytest.approx(reference.grad_sq, rel=1e-5)
        assert ours.param_sq == pytest.approx(reference.param_sq, rel=1e-5)
        assert ours.update_sq == pytest.approx(reference.update_sq, rel=1e-3)  # differences of rounded numbers
        assert ours.lost == pytest.approx(reference.lost, abs=20)


@PATHS
def test_counting_changes_no_number(fused, frozen):
    trained = []
    for statistics in (False, True):
        torch.manual_seed(0)
        p = torch.randn(20_000).bfloat16().requires_grad_()
        p.grad = torch.randn(20_000).bfloat16()
        AdamW([p], rounding="stochastic", statistics=statistics, fused=fused).step()
        trained.append(frozen(p))
    assert trained[0] == trained[1]


def test_must_be_asked_for_at_construction():
    with pytest.raises(RuntimeError, match=r"AdamW\.statistics\(\): build the optimizer with statistics=True\."):
        AdamW([torch.ones(2, requires_grad=True)]).statistics()


def test_before_the_first_step_there_is_none():
    assert AdamW([torch.ones(2, requires_grad=True)], statistics=True).statistics() == [None]


@PATHS
def test_short_rows_that_are_centralized_are_counted_once(fused):
    torch.manual_seed(0)
    p = torch.randn(5, 7, requires_grad=True)
    p.grad = torch.randn(5, 7)
    centered = p.grad - p.grad.mean(1, keepdim=True)
    optimizer = AdamW([p], lr=0.1, eps=0.0, centralize=True, statistics=True, fused=fused)
    optimizer.step()
    (counted,) = optimizer.statistics()
    assert counted.grad_norm == pytest.approx(centered.norm().item(), rel=1e-5)
    assert math.isfinite(counted.update_sq)


@pytest.mark.parametrize("statistics", [False, True])
def test_plain_pytorch_counts_only_when_asked(statistics, monkeypatch):
    counted = []
    monkeypatch.setattr(TensorStatistics, "from_tensors", lambda *tensors, **named: counted.append(tensors))
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    SGD([p], lr=0.1, fused=False, statistics=statistics).step()
    assert len(counted) == statistics


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e20, 1e30])
def test_norms_of_any_scale_are_counted(size, fused):
    torch.manual_seed(0)
    p = torch.randn(40_000).mul_(size).requires_grad_()
    optimizer = SGD([p], lr=0.5, statistics=True, fused=fused)
    p.grad = torch.randn(40_000) * size
    optimizer.step()
    (counted,) = optimizer.statistics()
    expected = {"grad_norm": p.grad, "param_norm": p.detach(), "update_norm": 0.5 * p.grad}
    for name, value in expected.items():
        assert getattr(counted, name) == pytest.approx(value.double().norm().item(), rel=1e-5)
