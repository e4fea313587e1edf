# SPDX-License-Identifier: Apache-2.0
"""Warm-up against its formula, torch's LinearLR, and the schedule behind it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LinearLR

from lightning_optkit.schedules import constant, cosine, linear, piecewise_constant, sgdr, warmup


@pytest.mark.parametrize(("step", "factor"), [(0, 0.01), (1, 0.2575), (2, 0.505), (4, 1.0), (5, 1.0), (99, 1.0)])
def test_values_of_the_linear_shape(step, factor):
    assert warmup(constant(), 4)(step) == pytest.approx(factor, rel=1e-14)
    assert warmup(constant(0.5), 0.04)(step, 100) == pytest.approx(0.5 * factor, rel=1e-14)


@pytest.mark.parametrize(("step", "factor"), [(0, 0.0625), (1, 0.125), (2, 0.25), (3, 0.5), (4, 1.0), (5, 1.0)])
def test_values_of_the_exponential_shape(step, factor):
    assert warmup(constant(), 4, "exponential", start_factor=0.0625)(step) == pytest.approx(factor, rel=1e-14)


@pytest.mark.parametrize("t", range(1, 11))
def test_is_the_textbook_ramp_from_zero(t):
    assert warmup(constant(), 10, start_factor=0.0)(t) == pytest.approx(t / 10, rel=1e-15)


def test_follows_torch(assert_follows_torch):
    make_scheduler = lambda optimizer: LinearLR(optimizer, start_factor=0.01, total_iters=30)  # noqa: E731
    assert_follows_torch(warmup(constant(), 30), make_scheduler)


@given(step=st.integers(0, 90))
def test_the_clock_of_the_schedule_starts_after_the_warm_up(step):
    assert warmup(cosine(), 10)(10 + step, 100) == cosine()(step, 90)
    assert warmup(cosine(), 0.1)(10 + step, 100) == cosine()(step, 90)


@pytest.mark.parametrize("shape", ["linear", "exponential"])
@pytest.mark.parametrize("schedule", [cosine(), linear(0.4, 0.1), sgdr()], ids=repr)
def test_is_continuous_where_the_schedule_begins(schedule, shape):
    warmed = warmup(schedule, 10, shape)
    first = schedule(0, 90)
    assert warmed(math.nextafter(10, 0), 100) == pytest.approx(first, abs=1e-12)
    assert warmed(10, 100) == first


def test_a_product_keeps_the_clock():
    schedule = warmup(constant(), 5) * piecewise_constant([30], [1.0, 0.1])
    assert [schedule(step) for step in (5, 29, 30)] == [1.0, 1.0, 0.1]


@given(step=st.integers(0, 100))
def test_no_warm_up_changes_nothing(step):
    assert warmup(cosine(), 0)(step, 100) == cosine()(step, 100)


def test_needs_no_length_of_the_run_where_the_schedule_needs_none():
    assert warmup(constant(), 10)(1_000) == 1.0


@pytest.mark.parametrize(("steps", "requirement"), [(101, "must not exceed"), (100, "must be less than")])
def test_rejects_a_warm_up_that_leaves_nothing_of_the_run(steps, requirement):
    with pytest.raises(ValueError, match=rf"^warmup\(steps={steps}\): steps {requirement} total_steps=100\.$"):
        warmup(cosine(), steps)(0, 100)


@pytest.mark.parametrize("steps", [-1, 1.0, 0.0, 2.5])
def test_rejects_a_length_outside_the_range(steps):
    with pytest.raises(ValueError, match=rf"^warmup\(steps={steps}\): steps must be an int >= 0 .+ in \(0, 1\) "):
        warmup(cosine(), steps)


def test_rejects_an_unknown_shape():
    with pytest.raises(ValueError, match=r"^warmup\(shape='cosine'\): shape must be one of 'linear', 'exponential'\.$"):
        warmup(cosine(), 10, "cosine")


@pytest.mark.parametrize(("shape", "start_factor"), [("linear", -0.1), ("linear", 1.1), ("exponential", 0.0)])
def test_rejects_a_start_outside_the_range(shape, start_factor):
    with pytest.raises(
        ValueError, match=rf"^warmup\(start_factor={start_factor}\): start_factor must be in [\[(]0, 1\]"
    ):
        warmup(cosine(), 10, shape, start_factor=start_factor)


def test_rejects_what_is_no_schedule():
    with pytest.raises(TypeError, match=r"^warmup\(schedule=0.1\): schedule must be a Schedule, such as cosine\(\)\.$"):
        warmup(0.1, 10)
