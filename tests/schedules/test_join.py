# SPDX-License-Identifier: Apache-2.0
"""Two schedules in sequence, against the parts themselves and torch's SequentialLR."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, SequentialLR

from lightning_optkit.schedules import constant, cosine, exponential, join, linear, rex, warmup


@given(step=st.integers(0, 150), at=st.integers(1, 99))
def test_each_part_is_the_whole_run_of_its_schedule(step, at):
    expected = rex()(step, at) if step < at else cosine()(step - at, 100 - at)
    assert join(rex(), at, cosine())(step, 100) == expected


@given(step=st.integers(0, 150), at=st.integers(1, 99))
def test_is_continuous_where_the_parts_end_and_begin_alike(step, at):
    schedule = join(linear(1.0, 0.4), at, linear(0.4, 0.0))
    assert schedule(math.nextafter(at, 0), 100) == pytest.approx(0.4, abs=1e-12)
    assert schedule(at, 100) == 0.4


@given(step=st.integers(0, 100))
def test_a_ramp_joined_to_a_schedule_is_a_warm_up(step):
    joined = join(linear(0.01, 1.0), 0.1, cosine())
    assert joined(step, 100) == pytest.approx(warmup(cosine(), 0.1)(step, 100), abs=1e-15)


def test_joins_can_be_joined():
    schedule = join(constant(1.0), 10, join(constant(0.5), 10, constant(0.1)))
    assert [schedule(step) for step in (0, 9, 10, 19, 20, 99)] == [1.0, 1.0, 0.5, 0.5, 0.1, 0.1]


def test_follows_torch(assert_follows_torch):
    def make_scheduler(optimizer):
        parts = [LinearLR(optimizer, 0.1, 1.0, total_iters=20), ExponentialLR(optimizer, gamma=0.9)]
        return SequentialLR(optimizer, parts, milestones=[20])

    assert_follows_torch(join(linear(0.1, 1.0), 20, exponential(0.9)), make_scheduler)


@pytest.mark.parametrize(("at", "requirement"), [(101, "must not exceed"), (100, "must be less than")])
def test_rejects_a_join_that_leaves_nothing_of_the_run(at, requirement):
    with pytest.raises(ValueError, match=rf"^join\(at={at}\): at {requirement} total_steps=100\.$"):
        join(cosine(), at, rex())(0, 100)


@pytest.mark.parametrize("at", [0, -1, 1.0, 0.0])
def test_rejects_a_place_outside_the_range(at):
    with pytest.raises(ValueError, match=rf"^join\(at={at}\): at must be an int >= 1 .+ in \(0, 1\) "):
        join(cosine(), at, rex())


@pytest.mark.parametrize(("a", "b", "name"), [(1.0, rex(), "a"), (rex(), 1.0, "b")])
def test_rejects_what_is_no_schedule(a, b, name):
    with pytest.raises(TypeError, match=rf"^join\({name}=1.0\): {name} must be a Schedule, such as cosine\(\)\.$"):
        join(a, 0.5, b)
