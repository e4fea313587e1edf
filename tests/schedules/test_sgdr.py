# SPDX-License-Identifier: Apache-2.0
"""Warm restarts against the equation of the paper and torch's CosineAnnealingWarmRestarts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from lightning_optkit.schedules import sgdr


@pytest.mark.parametrize(
    ("step", "cycle_length", "since_restart"),
    [(0, 10, 0), (5, 10, 5), (9, 10, 9), (10, 20, 0), (25, 20, 15), (30, 40, 0), (69, 40, 39), (70, 80, 0)],
)
def test_values_of_cycles_of_ten_twenty_forty(step, cycle_length, since_restart):
    factor = 0.1 + 0.9 * (1 + math.cos(math.pi * since_restart / cycle_length)) / 2
    assert sgdr(10, cycle_mult=2, min_factor=0.1)(step) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("cycle_mult", [1, 2, 3])
def test_follows_torch(assert_follows_torch, cycle_mult):
    make_scheduler = lambda optimizer: CosineAnnealingWarmRestarts(  # noqa: E731
        optimizer, T_0=4, T_mult=cycle_mult, eta_min=0.04
    )
    assert_follows_torch(sgdr(4, cycle_mult, min_factor=0.1), make_scheduler, steps=120)


@pytest.mark.parametrize("cycle_mult", [2.0, 3.0, 5.0])
@pytest.mark.parametrize("cycle", [1, 3, 10])
def test_restarts_exactly_where_a_cycle_ends(cycle, cycle_mult):
    end = 0
    for number in range(7):
        end += int(cycle * cycle_mult**number)
        assert sgdr(cycle, cycle_mult)(end) == 1.0
        assert sgdr(cycle, cycle_mult)(end - 0.5) < 0.7


@given(hundreds=st.integers(1, 20))
def test_a_fraction_restarts_on_its_whole_steps_whatever_the_run(hundreds):
    run, cycle = 100 * hundreds, 7 * hundreds  # 0.07 * 100 is 7.000000000000001: never reached by a step
    restarts = [step for step in range(run) if sgdr(0.07)(step, run) == 1.0]
    assert restarts == list(range(0, run, cycle))


@pytest.mark.parametrize("cycle_mult", [0.5, math.inf, -2])
def test_rejects_cycles_that_shrink(cycle_mult):
    with pytest.raises(ValueError, match=r"^sgdr\(cycle_mult=\S+\): cycle_mult must be in \[1, inf\)\.$"):
        sgdr(10, cycle_mult)


def test_rejects_a_min_factor_outside_the_range():
    with pytest.raises(ValueError, match=r"^sgdr\(min_factor=1.5\): min_factor must be in \[0, 1\]\.$"):
        sgdr(min_factor=1.5)


def test_rejects_a_cycle_longer_than_the_run():
    with pytest.raises(ValueError, match=r"^sgdr\(cycle=50\): cycle must not exceed total_steps=40\.$"):
        sgdr(50)(0, 40)
