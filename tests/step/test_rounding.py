# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding: unbiased, a function of (seed, step, tensor), and the same compiled and in plain PyTorch."""

import math

import pytest
import torch

from lightning_optkit._native import extension
from lightning_optkit.averaging import EMA
from lightning_optkit.optimizers import SGD
from lightning_optkit.step.rounding import round_stochastically

COPIES = 20_000
VALUES = {
    torch.bfloat16: [1 + 2**-7 / 3, -1.0001, 3e38, 1e-30, -123.456, 2.0**-130 * 1.3],
    torch.float16: [
        1 + 2**-10 / 3,
        -1.0001,
        65503.0,  # just below the largest
        2.0**-14 * 1.0003,  # the smallest normal numbers
        2.0**-15 * 1.01,  # subnormal: steps of 2^-24
        -(2.0**-24) * 5.4,
        2.0**-24 * 1.75,
        -(2.0**-24) * 0.3,  # below one step
        2.0**-24 * 0.999,
        2.0**-30,  # 1/64 of a step
    ],
}


def every_number(dtype):
    """All 65536 bit patterns."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def neighbors(value, dtype):
    """The numbers of `dtype` on both sides of `value`; twice the same if it is one of them."""
    numbers = every_number(dtype).double()
    numbers = numbers[numbers.isfinite()].unique()
    return numbers[numbers <= value].max().item(), numbers[numbers >= value].min().item()


def rounded(value, dtype, seed=0, step=1, tensor_index=0):
    return round_stochastically(torch.full((COPIES,), value), dtype, seed, step, tensor_index)


@pytest.mark.parametrize(("dtype", "value"), [(d, v) for d, values in VALUES.items() for v in values], ids=str)
def test_rounds_to_a_neighbour_and_is_right_on_average(dtype, value):
    value = torch.tensor(value).item()  # as fp32 holds it
    low, high = neighbors(value, dtype)
    result = rounded(value, dtype).double()
    assert set(result.unique().tolist()) <= {low, high}
    probability = (value - low) / (high - low)
    standard_error = (high - low) * math.sqrt(probability * (1 - probability) / COPIES)
    assert abs(result.mean().item() - value) < 5 * standard_error


@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_a_number_that_fits_stays(dtype):
    numbers = every_number(dtype)
    result = round_stochastically(numbers.float(), dtype, seed=3, step=4, tensor_index=5)
    assert torch.equal(result.isnan(), numbers.isnan())
    fits = ~numbers.isnan()
    assert torch.equal(result[fits].view(torch.int16), numbers[fits].view(torch.int16))  # zeros keep their signs


@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_infinities_and_nan_stay(dtype):
    result = round_stochastically(torch.tensor([math.inf, -math.inf, math.nan]), dtype, 0, 1, 0)
    assert result[:2].tolist() == [math.inf, -math.inf]
    assert result[2].isnan()


def test_beyond_the_largest_float16_the_nearest_is_taken():
    assert set(rounded(65519.0, torch.float16).tolist()) == {65504.0}
    assert set(rounded(65520.0, torch.float16).tolist()) == {math.inf}
    assert set(rounded(-1e38, torch.float16).tolist()) == {-math.inf}


def test_beyond_the_largest_bfloat16_either_it_or_infinity_is_taken():
    largest = torch.finfo(torch.bfloat16).max
    between = 3.395e38  # a third of the way
    assert set(rounded(between, torch.bfloat16).tolist()) == {largest, math.inf}


@pytest.mark.parametrize("dtype", VALUES, ids=str)
@pytest.mark.parametrize("changed", [dict(seed=1), dict(step=2), dict(tensor_index=1)], ids=str)
def test_the_bits_are_a_function_of_seed_step_and_tensor(dtype, changed):
    value = VALUES[dtype][0]
    first = rounded(value, dtype)
    assert torch.equal(first, rounded(value, dtype))
    other = rounded(value, dtype, **changed)
    # A third is rounded up: two independent draws differ in 4 of 9.
    assert (first != other).double().mean().item() == pytest.approx(4 / 9, abs=0.02)


def test_neighbouring_elements_are_independent():
    up = (rounded(1 + 2**-8, torch.bfloat16).double() > 1).double() - 0.5
    for distance in (1, 2, 16, 64):
        correlation = (up[distance:] * up[:-distance]).mean() / 0.25
        assert abs(correlation) < 5 / math.sqrt(COPIES)


def step_both_ways(params, grads, lr, seed):
    """The parameters after one step of SGD, compiled and by plain PyTorch."""
    results = []
    for fused in (None, False):
        p = params.clone().requires_grad_()
        p.grad = grads.clone()
        optimizer = SGD([p], lr=lr, rounding="stochastic", fused=fused)
        optimizer.param_groups[0]["rounding_seed"] = seed
        optimizer.step()
        results.append(p.detach())
    return results


@pytest.mark.skipif(extension is None, reason="no compiled extension")
@pytest.mark.parametrize("size", [1e-3, 1.0], ids=["small updates", "large updates"])
@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_compiled_and_reference_agree_on_every_bit_for_every_stored_number(dtype, size):
    params = every_number(dtype)
    torch.manual_seed(0)
    grads = (params[torch.randperm(len(params))] if size == 1 else params * size * torch.randn(len(params))).to(dtype)
    compiled, reference = step_both_ways(params, grads, lr=0.37, seed=2**40 + 7)

    exact = params.double() - grads.double() * 0.37
    smallest = 2.0**-126  # the compiled loop takes smaller numbers for zero
    operands = torch.stack([params.double(), grads.double(), grads.double() * 0.37, exact])
    normal = ((operands.abs() >= smallest) | (operands == 0)).all(0)
    assert normal.double().mean() > 0.9
    assert torch.equal(compiled.isnan(), reference.isnan())
    compared = normal & ~compiled.isnan()
    assert torch.equal(compiled[compared], reference[compared])  # every bit, but for the sign of a zero
    flushed = ~normal & exact.isfinite()
    assert ((compiled.double() - exact).abs()[flushed] <= exact.abs()[flushed] * 2**-7 + 4 * smallest).all()


@pytest.mark.skipif(extension is None, reason="no compiled extension")
def test_compiled_and_reference_agree_in_later_chunks_and_other_layouts():
    torch.manual_seed(0)
    values = torch.randn(300, 200).bfloat16()  # four chunks
    for params in (values, values.t(), values.view(30, 10, 20, 10).to(memory_format=torch.channels_last)):
        grads = torch.randn(params.shape).bfloat16()
        compiled, reference = step_both_ways(params, grads, lr=0.01, seed=5)
        assert torch.equal(compiled, reference)


# --- a parameter that overflowed and was brought back ---

BOTH_PATHS = pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
# How every other element leaves the range of its dtype: from what share of the largest number, by what gradient.
WAYS_OUT = {
    "up": (1.0, -math.inf),
    "down": (-1.0, math.inf),
    "to NaN": (1.0, math.nan),
    "by a finite step": (1.0, "-largest"),
    "down by a finite step": (-1.0, "largest"),
}


def brought_back(dtype, rounding, way, fused, lr=2.0**-4, steps=40, **kwargs):
    """Parameters after training that went on from where they were put back; and those that never overflowed."""
    share, grad = WAYS_OUT[way]
    largest = torch.finfo(dtype).max
    grad = {"largest": largest, "-largest": -largest}.get(grad, grad)
    results = []
    for overflows in (True, False):
        torch.manual_seed(0)
        p = torch.ones(300, dtype=dtype)
        p[::2] = share * largest if overflows else 1.0
        p.requires_grad_()
        optimizer = SGD([p], lr=lr, rounding=rounding, fused=fused, statistics=True, **kwargs)
        p.grad = torch.zeros_like(p)
        p.grad[::2] = grad if overflows else 0.0
        optimizer.step()
        assert bool(p[::2].isfinite().any()) is not overflows and p[1::2].eq(1).all()
        with torch.no_grad():
            p.copy_(torch.ones_like(p))
        for _ in range(steps):
            p.grad = torch.randn(300).to(dtype)
            optimizer.step()
            assert p.isfinite().all()
        results.append((p.detach(), optimizer.state[p].get("compensation", torch.zeros(())), optimizer.statistics()))
    return results


@BOTH_PATHS
@pytest.mark.parametrize("way", WAYS_OUT)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_parameter_that_overflowed_and_was_brought_back_trains_on(dtype, rounding, way, fused):
    back, twin = brought_back(dtype, rounding, way, fused, lr=1.0 if "finite" in way else 2.0**-4)
    assert torch.equal(back[0], twin[0]) and torch.equal(back[1], twin[1])
    assert back[2] == twin[2]


@BOTH_PATHS
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_compensation_that_was_loaded_as_not_finite_counts_as_nothing(bad, fused):
    p = torch.ones(37, dtype=torch.bfloat16, requires_grad=True)
    optimizer = SGD([p], lr=0.01, rounding="kahan", fused=fused)
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["compensation"] = torch.full_like(p, bad)
    optimizer.load_state_dict(saved)
    before = p.detach().clone()
    optimizer.step()
    assert (before - p).max() > 0 and p.isfinite().all()
    assert optimizer.state[p]["compensation"].isfinite().all()


@pytest.mark.skipif(extension is None, reason="no compiled extension")
@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_compensations_of_both_paths_agree_on_every_bit_for_every_stored_number(dtype):
    params = every_number(dtype)
    results = []
    for fused in (None, False):
        p = params.clone().requires_grad_()
        optimizer = SGD([p], lr=0.37, rounding="kahan", fused=fused)
        for seed in (0, 1):
            p.grad = params[torch.randperm(len(params), generator=torch.Generator().manual_seed(seed))]
            optimizer.step()
        results.append((p.detach(), optimizer.state[p]["compensation"]))
    (compiled, lost), (reference, lost_reference) = results
    smallest = 2.0**-100  # the compiled loop takes numbers below 2^-126 for zero, and compensations are that much less
    normal = (compiled.double().abs() > smallest) & (reference.double().abs() > smallest)
    assert normal.double().mean() > 0.7
    assert lost.isfinite().all() and lost_reference.isfinite().all()
    assert torch.equal(compiled.isnan(), reference.isnan())
    assert torch.equal(compiled[normal], reference[normal])
    assert torch.equal(lost[normal], lost_reference[normal])


@BOTH_PATHS
def test_an_average_and_a_momentum_that_saw_an_infinity_keep_it_as_torchs_do(fused):
    ours, theirs = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    optimizer = SGD([ours], lr=0.1, momentum=0.9, average=EMA(0.9), fused=fused)
    reference = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    module = torch.nn.ParameterList([theirs])
    averaged = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for grad in ([1.0, 1.0, 1.0, 1.0], [1.0, math.inf, -math.inf, math.nan], [1.0] * 4):
        with torch.no_grad():
            ours.nan_to_num_(nan=1.0, posinf=1.0, neginf=1.0)
            theirs.nan_to_num_(nan=1.0, posinf=1.0, neginf=1.0)
        ours.grad, theirs.grad = torch.tensor(grad), torch.tensor(grad)
        optimizer.step()
        reference.step()
        averaged.update_parameters(module)
    state = optimizer.state[ours]
    torch.testing.assert_close(state["ema"], averaged.module[0].detach(), equal_nan=True)
    torch.testing.assert_close(state["momentum_buffer"], reference.state[theirs]["momentum_buffer"], equal_nan=True)
