# SPDX-License-Identifier: Apache-2.0
"""Properties of all schedules: lengths, checks, printing, equality, pickling, products, range."""

import dataclasses
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lightning_optkit.schedules as schedules
from lightning_optkit.schedules import (
    constant,
    cosine,
    exponential,
    inverse_sqrt,
    inverse_time,
    join,
    linear,
    natural_exponential,
    one_cycle,
    piecewise_constant,
    polynomial,
    rex,
    sgdr,
    triangular,
    warmup,
    warmup_cosine,
    warmup_stable_decay,
)
from lightning_optkit.schedules.schedule import check_length, check_schedule, resolve_length

LENGTH = 240  # steps in the run of the tests below; each fraction in FRACTIONS makes it whole
FRACTIONS = (0.05, 0.1, 0.125, 0.25, 0.3, 0.35, 0.4, 0.5)

# Each maker takes one length, an int or a fraction, and gives a schedule that depends on it.
MAKERS = {
    "constant": lambda length: join(constant(0.7), length, constant(0.2)),
    "piecewise_constant": lambda length: piecewise_constant([length, 0.9], [1.0, 0.5, 0.25]),
    "inverse_time": lambda length: inverse_time(3.0, every=length),
    "exponential": lambda length: exponential(0.3, every=length),
    "natural_exponential": lambda length: natural_exponential(2.0, every=length),
    "cosine": lambda length: cosine(0.1, steps=length),
    "polynomial": lambda length: polynomial(2.5, 0.1, steps=length),
    "linear": lambda length: linear(0.9, 0.2, steps=length),
    "inverse_sqrt": lambda length: inverse_sqrt(length),
    "rex": lambda length: rex(0.1, steps=length),
    "warmup_stable_decay": lambda length: warmup_stable_decay(length, 0.4),
    "one_cycle": lambda length: one_cycle(length),
    "one_cycle three_phase": lambda length: one_cycle(length, three_phase=True, whole_steps=False),
    "triangular": lambda length: triangular(length, 0.1, mode="triangular2"),
    "exp_range": lambda length: triangular(length, mode="exp_range", gamma=0.99),
    "sgdr": lambda length: sgdr(length, cycle_mult=1.5, min_factor=0.1),
    "warmup": lambda length: warmup(cosine(), length, shape="exponential"),
    "warmup_cosine": lambda length: warmup_cosine(length),
    "join": lambda length: join(linear(0.0, 1.0), length, rex()),
    "product": lambda length: warmup(constant(), length) * inverse_time(2.0, every=length) * sgdr(),
}

every_schedule = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def test_the_table_holds_every_public_schedule():
    public = set(schedules.__all__) - {"Length", "Schedule", "plot"}
    assert public == {name.split()[0] for name in MAKERS} - {"exp_range", "product"}


# --- properties of every schedule ---


@every_schedule
@given(step=st.floats(0, 3 * LENGTH), fraction=st.sampled_from(FRACTIONS))
def test_the_factor_is_finite_and_in_zero_one(make, step, fraction):
    factor = make(fraction)(step, LENGTH)
    assert type(factor) is float
    assert 0.0 <= factor <= 1.0


@every_schedule
@given(step=st.integers(0, 2 * LENGTH), fraction=st.sampled_from(FRACTIONS))
def test_a_fraction_equals_the_same_number_of_steps(make, step, fraction):
    steps = round(fraction * LENGTH)
    assert math.isclose(steps, fraction * LENGTH)
    assert make(fraction)(step, LENGTH) == make(steps)(step, LENGTH)


@pytest.mark.parametrize("run", [1, 7.5, 10**12], ids=["one epoch", "epochs", "tokens"])
@pytest.mark.parametrize("name", sorted(MAKERS.keys() - {"exp_range", "one_cycle"}))  # those two count steps
def test_fractions_do_not_care_about_the_unit(name, run):
    schedule = MAKERS[name](0.3)
    for share in (k / 97 for k in range(140)):  # 97 is prime: no share falls on a jump
        assert schedule(share * run, run) == pytest.approx(schedule(share * LENGTH, LENGTH), abs=1e-9)


@every_schedule
def test_prints_as_the_call_that_made_it(make):
    for length in (0.3, 12):
        schedule = make(length)
        assert eval(repr(schedule), vars(schedules).copy()) == schedule


@every_schedule
def test_survives_pickling(make):
    schedule = make(0.3)
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule and hash(copy) == hash(schedule)
    assert [copy(step, LENGTH) for step in range(LENGTH)] == [schedule(step, LENGTH) for step in range(LENGTH)]


@every_schedule
def test_equal_by_value(make):
    assert make(0.3) == make(0.3)
    assert len({make(0.3), make(0.3), make(0.35)}) == 2


@every_schedule
def test_cannot_be_changed(make):
    with pytest.raises(dataclasses.FrozenInstanceError):
        make(0.3).name = "other"


@every_schedule
def test_a_fraction_of_an_unknown_run_raises(make):
    with pytest.raises(ValueError, match=r"^\w+\(total_steps=None\): total_steps must be given, because .+\.$"):
        make(0.3)(0)


@every_schedule
@pytest.mark.parametrize("step", [-1, -0.5, math.nan, math.inf])
def test_rejects_a_step_outside_the_range(make, step):
    with pytest.raises(ValueError, match=r"^\w+\(step=\S+\): step must be in \[0, inf\)\.$"):
        make(0.3)(step, LENGTH)


@every_schedule
@pytest.mark.parametrize("total_steps", [0, -5, math.inf])
def test_rejects_a_run_without_a_length(make, total_steps):
    with pytest.raises(ValueError, match=r"^\w+\(total_steps=\S+\): total_steps must be in \(0, inf\)\.$"):
        make(0.3)(0, total_steps)


@pytest.mark.parametrize("name", sorted(MAKERS.keys() - {"inverse_time", "exponential", "natural_exponential"}))
def test_a_length_beyond_the_run_raises(name):
    with pytest.raises(ValueError, match=r"=300\): \w+ must not exceed total_steps=240\.$"):
        MAKERS[name](300)(0, LENGTH)


@pytest.mark.parametrize("name", ["inverse_time", "exponential", "natural_exponential"])
def test_a_unit_of_time_may_exceed_the_run(name):
    assert MAKERS[name](300)(100, LENGTH) == MAKERS[name](300)(100)


@every_schedule
@pytest.mark.parametrize("step", [0, 1, 40, LENGTH, np.int64(40), np.float32(40)])
def test_the_factor_is_a_plain_float(make, step):
    assert type(make(0.3)(step, LENGTH)) is float


# --- equality, products ---


def test_one_step_is_not_the_whole_run():
    assert cosine(steps=1) != cosine(steps=1.0)


def test_a_whole_number_and_its_float_make_the_same_schedule():
    assert inverse_time(1) == inverse_time(1.0)
    assert hash(linear(1, 0)) == hash(linear(1.0, 0.0))


def test_schedules_of_different_kinds_differ():
    assert cosine() != rex()
    assert cosine() != "cosine(min_factor=0.0, steps=1.0)"


@given(step=st.integers(0, LENGTH))
def test_a_product_multiplies(step):
    a, b = linear(), inverse_time(0.1)
    assert (a * b)(step, LENGTH) == a(step, LENGTH) * b(step, LENGTH)


def test_a_product_does_not_care_how_it_was_grouped():
    a, b, c = linear(), inverse_time(0.1), constant(0.5)
    assert a * (b * c) == (a * b) * c
    assert repr(a * (b * c)) == f"{a!r} * {b!r} * {c!r}"


@pytest.mark.parametrize("other", [2, 0.5, "cosine()", None])
def test_a_product_needs_two_schedules(other):
    with pytest.raises(TypeError, match=r"unsupported operand|can't multiply"):
        cosine() * other


# --- lengths ---


@pytest.mark.parametrize("value", [-3, 0, 0.0, -0.1, 1.5, math.nan, math.inf])
def test_rejects_a_length_outside_the_range(value):
    requirement = r"steps must be an int >= 1 \(steps\) or a float in \(0, 1\] \(fraction of the run\)\."
    with pytest.raises(ValueError, match=rf"^cosine\(steps={value!r}\): {requirement}$"):
        cosine(steps=value)


@pytest.mark.parametrize("value", [True, "10", None])
def test_rejects_a_length_that_is_no_number(value):
    with pytest.raises(TypeError, match=rf"^cosine\(steps={value!r}\): steps must be an int >= 1"):
        cosine(steps=value)


def test_a_length_keeps_its_kind():
    assert repr(check_length("f", "n", 1)) == "1"
    assert repr(check_length("f", "n", 1.0)) == "1.0"
    assert check_length("f", "n", 0, minimum=0) == 0


def test_a_fraction_hits_the_whole_number_that_floating_point_misses():
    assert 0.07 * 100 != 7
    assert resolve_length("f", "n", 0.07, 100) == 7


@pytest.mark.parametrize(("fraction", "run", "steps"), [(0.05, 90, 4.5), (0.05, 1, 0.05), (1 / 3, 100, 100 / 3)])
def test_a_fraction_is_not_rounded_otherwise(fraction, run, steps):
    assert resolve_length("f", "n", fraction, run) == pytest.approx(steps, rel=1e-15)


def test_a_part_before_another_must_leave_something():
    assert resolve_length("f", "n", 9, 10, must_leave_rest=True) == 9
    with pytest.raises(ValueError, match=r"^f\(n=10\): n must be less than total_steps=10\.$"):
        resolve_length("f", "n", 10, 10, must_leave_rest=True)


def test_rejects_what_is_no_schedule():
    with pytest.raises(TypeError, match=r"^join\(a=0.5\): a must be a Schedule, such as cosine\(\)\.$"):
        check_schedule("join", "a", 0.5)
