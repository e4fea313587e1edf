# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding: unbiased, a function of (seed, step, tensor), and the same compiled and in plain PyTorch."""

import math

import pytest
import torch

from lightning_optkit._native import extension
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


def neighbours(value, dtype):
    """The numbers of `dtype` on both sides of `value`; twice the same if it is one of them."""
    numbers = every_number(dtype).double()
    numbers = numbers[numbers.isfinite()].unique()
    return numbers[numbers <= value].max().item(), numbers[numbers >= value].min().item()


def rounded(value, dtype, seed=0, step=1, tensor_index=0):
    return round_stochastically(torch.full((COPIES,), value), dtype, seed, step, tensor_index)


@pytest.mark.parametrize(("dtype", "value"), [(d, v) for d, values in VALUES.items() for v in values], ids=str)
def test_rounds_to_a_neighbour_and_is_right_on_average(dtype, value):
    value = torch.tensor(value).item()  # as fp32 holds it
    low, high = neighbours(value, dtype)
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
