# SPDX-License-Identifier: Apache-2.0
"""EMA in bfloat16: the same bits on both paths, and unbiased however slow it is."""

import pytest
import torch

from lightning_optkit import _native
from lightning_optkit.averaging import EMA
from lightning_optkit.averaging.standalone import update_average_
from lightning_optkit.optimizers import SGD, AdamW

PATHS = pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
NARROW = EMA(0.999, dtype=torch.bfloat16)


def trained(average, fused, *, lr=0.1, shape=(5000,), steps=4):
    torch.manual_seed(0)
    weight = torch.rand(shape).add(1).requires_grad_()
    optimizer = AdamW([weight], lr=lr, average=average, fused=fused)
    for _ in range(steps):
        weight.grad = torch.randn(shape)
        optimizer.step()
    return weight, optimizer


@pytest.mark.skipif(_native.extension is None, reason="the extension is not built")
@pytest.mark.parametrize("threads_used", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "stages"),
    [
        (torch.float32, {}),
        (torch.float32, dict(state_dtype="int8")),
        (torch.bfloat16, dict(rounding="stochastic", state_dtype=torch.bfloat16)),
        (torch.bfloat16, dict(rounding="split24", state_dtype="int8")),
        (torch.bfloat16, dict(rounding="split32", state_dtype=torch.bfloat16)),
        (torch.bfloat16, dict(rounding="kahan")),
        (torch.float16, {}),
    ],
    ids=["fp32", "fp32-int8", "bf16-bf16", "split24-int8", "split32-bf16", "kahan", "fp16"],
)
@pytest.mark.parametrize("shape", [(3,), (33, 7), (40_000,)], ids=str)
def test_both_paths_round_it_by_the_same_bits(shape, dtype, stages, threads_used, threads, frozen):
    threads(threads_used)
    # A decay and values whose products are exact, so that a path with fused operations rounds the same numbers.
    average = EMA(0.5, dtype=torch.bfloat16)
    held = []
    for fused in (None, False):
        weight = (torch.arange(torch.Size(shape).numel()) % 1000).float().div(64).view(shape).to(dtype).requires_grad_()
        optimizer = SGD([weight], lr=2**-9, average=average, fused=fused, **stages)
        for step in range(3):
            weight.grad = torch.full(shape, float(step + 1)).to(dtype)
            optimizer.step()
        state = optimizer.state[weight]
        assert state["ema"].dtype == torch.bfloat16
        held.append(state["ema"])
    assert torch.equal(*held)


@PATHS
def test_it_follows_a_weight_that_moves_by_less_than_a_unit(fused):
    narrow, wide = [], []
    for average, values in ((NARROW, narrow), (EMA(0.999), wide)):
        weight = torch.ones(20_000).requires_grad_()
        optimizer = SGD([weight], lr=2e-5, average=average, fused=fused)
        for _ in range(500):
            weight.grad = -torch.ones_like(weight)
            optimizer.step()
        values.append(optimizer.state[weight]["ema"].float())
    # Rounded to nearest it would stay 1: a step moves it by 1e-5, half a unit is 4e-3.
    assert float(wide[0].mean()) > 1.001
    assert float(narrow[0].mean()) == pytest.approx(float(wide[0].mean()), abs=1e-4)
    assert float((narrow[0] - wide[0]).abs().max()) < 2**-6


@PATHS
@pytest.mark.parametrize(("lr", "units"), [(1e-4, 1.0), (1e-2, 3.0)])
def test_its_error_is_that_of_its_docstring(lr, units, fused):
    (weight, optimizer), (same, other) = (
        trained(average, fused, lr=lr, steps=400) for average in (EMA(0.99, dtype=torch.bfloat16), EMA(0.99))
    )
    narrow, wide = optimizer.state[weight]["ema"].float(), other.state[same]["ema"]
    assert torch.equal(weight, same)
    unit = 2.0 ** (torch.frexp(wide).exponent - 8)
    distance = (weight.detach() - wide).abs().mean()
    error = float(((narrow - wide) / unit).square().mean().sqrt())
    assert error < units
    assert error < 2 * float((distance / unit / 2 + 1).mean().sqrt())


@PATHS
def test_a_weight_without_a_gradient_is_averaged_all_the_same(fused):
    moving, idle = (torch.full((4000,), 1.0).requires_grad_() for _ in range(2))
    optimizer = SGD([moving, idle], lr=1e-3, average=EMA(0.99, dtype=torch.bfloat16), fused=fused)
    for param in (moving, idle):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    with torch.no_grad():
        idle += 0.25
    for _ in range(100):
        idle.grad, moving.grad = None, torch.zeros_like(moving)
        optimizer.step()
    expected = 1.25 - 0.25 * 0.99**100
    assert float(optimizer.state[idle]["ema"].float().mean()) == pytest.approx(expected, abs=1e-3)


def test_beside_the_optimizers_of_torch_it_is_rounded_so_too():
    weight = torch.ones(20_000).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=2e-5)
    for step in range(1, 501):
        weight.grad = -torch.ones_like(weight)
        optimizer.step()
        update_average_(optimizer, NARROW, step)
    other = SGD([(same := torch.ones(20_000).requires_grad_())], lr=2e-5, average=EMA(0.999))
    for _ in range(500):
        same.grad = -torch.ones_like(same)
        other.step()
    held = optimizer.state[weight]["ema"]
    assert held.dtype == torch.bfloat16
    assert float(held.float().mean()) == pytest.approx(float(other.state[same]["ema"].mean()), abs=1e-4)


@pytest.mark.parametrize("averages", [(EMA(0.9), NARROW), (NARROW, EMA(0.9))], ids=["narrower", "wider"])
def test_beside_them_the_dtype_asked_for_is_that_of_the_next_update(averages):
    weight = torch.rand(500).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    for step, average in enumerate(averages, start=1):
        update_average_(optimizer, average, step)
        assert optimizer.state[weight]["ema"].dtype == average.dtype
    torch.testing.assert_close(optimizer.state[weight]["ema"].float(), weight.detach(), rtol=2**-7, atol=1e-3)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_other_parameters_keep_their_precision(dtype, fused):
    weight = torch.ones(3, dtype=dtype).requires_grad_()
    optimizer = SGD([weight], lr=0.1, average=NARROW, fused=fused)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["ema"].dtype == dtype


@PATHS
@pytest.mark.parametrize(("saved", "loading"), [(NARROW, EMA(0.999)), (EMA(0.999), NARROW)], ids=["narrow", "wide"])
def test_a_checkpoint_of_one_is_loaded_into_the_other(saved, loading, fused):
    weight, optimizer = trained(saved, fused)
    loaded = AdamW([weight], lr=0.1, average=loading, fused=fused)
    with pytest.warns(UserWarning, match="its average goes on as EMA"):
        loaded.load_state_dict(optimizer.state_dict())
    weight.grad = torch.zeros_like(weight)
    before = optimizer.state[weight]["ema"].float()
    loaded.step()
    held = loaded.state[weight]["ema"]
    assert held.dtype == loading.dtype
    torch.testing.assert_close(held.float(), before, rtol=2**-6, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, "bfloat16", None], ids=str)
def test_another_dtype_is_refused(dtype):
    with pytest.raises((TypeError, ValueError), match=r"^EMA\(dtype=.*\): dtype must be one of torch"):
        EMA(0.9, dtype=dtype)
