# SPDX-License-Identifier: Apache-2.0
"""Warm-up and cosine against the formula and against the composition that it abbreviates."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_optkit.schedules import cosine, warmup, warmup_cosine


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.01), (10, 0.505), (20, 1.0), (60, 0.75), (80, 0.5), (100, 0.25), (140, 0.0), (999, 0.0)]
)
def test_values(step, factor):
    assert warmup_cosine(20)(step, 140) == pytest.approx(factor, abs=1e-14)


@given(
    step=st.integers(0, 220),
    length=st.one_of(st.integers(0, 199), st.floats(0.001, 0.99)),
    min_factor=st.floats(0, 1),
    start_factor=st.floats(0, 1),
)
def test_is_short_for_a_warm_up_in_front_of_a_cosine(step, length, min_factor, start_factor):
    short = warmup_cosine(length, min_factor, start_factor=start_factor)
    composed = warmup(cosine(min_factor), length, start_factor=start_factor)
    assert short(step, 200) == pytest.approx(composed(step, 200), abs=1e-12)


def test_is_continuous_at_the_peak():
    assert warmup_cosine(0.05)(math.nextafter(5, 0), 100) == pytest.approx(1.0, abs=1e-12)
    assert warmup_cosine(0.05)(5, 100) == 1.0


@pytest.mark.parametrize(("steps", "requirement"), [(101, "must not exceed"), (100, "must be less than")])
def test_rejects_a_warm_up_that_leaves_nothing_of_the_run(steps, requirement):
    with pytest.raises(ValueError, match=rf"^warmup_cosine\(warmup={steps}\): warmup {requirement} total_steps=100\.$"):
        warmup_cosine(steps)(0, 100)


@pytest.mark.parametrize("steps", [-1, 1.0, 5.0])
def test_rejects_a_length_outside_the_range(steps):
    with pytest.raises(ValueError, match=rf"^warmup_cosine\(warmup={steps}\): warmup must be an int >= 0 "):
        warmup_cosine(steps)


def test_rejects_a_run_of_unknown_length():
    with pytest.raises(ValueError, match=r"^warmup_cosine\(total_steps=None\): .+ the cosine ends with the run\.$"):
        warmup_cosine(10)(0)


@pytest.mark.parametrize("name", ["min_factor", "start_factor"])
def test_rejects_a_factor_outside_the_range(name):
    with pytest.raises(ValueError, match=rf"^warmup_cosine\({name}=1.5\): {name} must be in \[0, 1\]\.$"):
        warmup_cosine(**{name: 1.5})
