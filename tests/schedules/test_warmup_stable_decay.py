# SPDX-License-Identifier: Apache-2.0
"""Warmup-stable-decay against its formula in each part and shape."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_optkit.schedules import warmup_stable_decay

START_OF_DECAY = 80
SHAPES = ["1-sqrt", "linear", "cosine", "exponential"]


@pytest.mark.parametrize(("step", "factor"), [(0, 0.01), (5, 0.505), (10, 1.0), (11, 1.0), (79, 1.0), (80, 1.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_before_the_decay(step, factor, shape):
    schedule = warmup_stable_decay(10, 20, shape=shape, min_factor=0.1)
    assert schedule(step, 100) == pytest.approx(factor, rel=1e-14)


@pytest.mark.parametrize(
    ("shape", "middle", "three_quarters"),
    [
        ("1-sqrt", 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)),
        ("linear", 0.5, 0.25),
        ("cosine", 0.5, (1 - math.sqrt(0.5)) / 2),
    ],
)
def test_values_in_the_decay(shape, middle, three_quarters):
    schedule = warmup_stable_decay(10, 20, shape=shape, min_factor=0.2)
    assert schedule(90, 100) == pytest.approx(0.2 + 0.8 * middle, rel=1e-14)
    assert schedule(95, 100) == pytest.approx(0.2 + 0.8 * three_quarters, rel=1e-14)


@pytest.mark.parametrize(("step", "factor"), [(85, 0.5), (90, 0.25), (95, 0.125)])
def test_exponential_decay_halves_at_equal_distance(step, factor):
    schedule = warmup_stable_decay(10, 20, shape="exponential", min_factor=0.0625)
    assert schedule(step, 100) == pytest.approx(factor, rel=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_ends_and_stays_at_the_min_factor(shape):
    schedule = warmup_stable_decay(10, 20, shape=shape, min_factor=0.3)
    assert schedule(100, 100) == pytest.approx(0.3, rel=1e-15)
    assert schedule(150, 100) == pytest.approx(0.3, rel=1e-15)


@given(step=st.integers(0, START_OF_DECAY - 1), total_steps=st.integers(100, 10_000))
def test_a_longer_run_agrees_until_the_decay(step, total_steps):
    schedule = warmup_stable_decay(10, 20)
    assert schedule(step, total_steps) == schedule(step, 100)


@pytest.mark.parametrize("knot", [10.0, 80.0])
def test_is_continuous_where_the_parts_meet(knot):
    schedule = warmup_stable_decay(10, 20, shape="cosine")
    assert schedule(math.nextafter(knot, 0), 100) == pytest.approx(1.0, abs=1e-12)
    assert schedule(math.nextafter(knot, 100), 100) == pytest.approx(1.0, abs=1e-12)


def test_warm_up_and_decay_may_fill_the_run():
    assert warmup_stable_decay(0.3, 0.7, shape="linear")(30, 100) == 1.0
    assert warmup_stable_decay(0, 1.0, shape="linear")(25, 100) == 0.75


def test_rejects_overlap_at_construction():
    with pytest.raises(ValueError, match=r"^warmup_stable_decay\(decay=0.6\): warmup and decay must fit into the run"):
        warmup_stable_decay(0.5, 0.6)


def test_rejects_overlap_in_this_run():
    schedule = warmup_stable_decay(60, 0.5)
    assert schedule(60, 120) == 1.0
    with pytest.raises(ValueError, match=r"^warmup_stable_decay\(decay=0.5\): warmup and decay must fit into the run"):
        schedule(0, 119)


def test_rejects_a_run_of_unknown_length():
    with pytest.raises(ValueError, match=r"^warmup_stable_decay\(total_steps=None\): .+ counted from the end"):
        warmup_stable_decay(10, 20)(0)


def test_rejects_an_unknown_shape():
    with pytest.raises(ValueError, match=r"^warmup_stable_decay\(shape='sqrt'\): shape must be one of '1-sqrt', 'lin"):
        warmup_stable_decay(shape="sqrt")


@pytest.mark.parametrize(("shape", "interval"), [("linear", r"\[0, 1\]"), ("exponential", r"\(0, 1\]")])
def test_rejects_a_min_factor_outside_the_range(shape, interval):
    with pytest.raises(ValueError, match=rf"^warmup_stable_decay\(min_factor=\S+\): min_factor must be in {interval}"):
        warmup_stable_decay(shape=shape, min_factor=-0.1 if shape == "linear" else 0.0)


def test_rejects_a_start_outside_the_range():
    with pytest.raises(
        ValueError, match=r"^warmup_stable_decay\(start_factor=-0.1\): start_factor must be in \[0, 1\]"
    ):
        warmup_stable_decay(start_factor=-0.1)


@pytest.mark.parametrize("arguments", [dict(warmup=-1), dict(decay=0), dict(decay=-20)])
def test_rejects_a_negative_length(arguments):
    with pytest.raises(ValueError, match=r"^warmup_stable_decay\(\w+=-?\d+\): \w+ must be an int >= [01] "):
        warmup_stable_decay(**arguments)
