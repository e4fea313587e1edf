# SPDX-License-Identifier: Apache-2.0
"""The argument checks: the interval as written in mathematics, and messages that name argument, value and range."""

import math

import numpy as np
import pytest

from lightning_optkit._checks import check_in, check_int, check_one_of, check_pattern


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", [0, 0.0, 0.5, 1 - 2**-53], [-5e-324, 1, 1.0, math.inf]),
        ("(0, 1]", [5e-324, 1], [0, -0.0, 1 + 2**-52]),
        ("[0, inf)", [0, 1e308], [math.inf, -1]),
        ("(-inf, inf)", [-1e308, 0, 1e308], [math.inf, -math.inf]),
        ("[0, inf]", [math.inf], [-1e-300]),
    ],
)
def test_square_brackets_include_a_bound_and_round_ones_exclude_it(interval, inside, outside):
    for value in inside:
        assert check_in("Owner", "name", value, interval) == value
    for value in outside:
        with pytest.raises(ValueError, match="must be in"):
            check_in("Owner", "name", value, interval)


def test_nan_lies_in_no_interval():
    with pytest.raises(ValueError, match=r"^Owner\(name=nan\): name must be in \[-inf, inf\]\.$"):
        check_in("Owner", "name", math.nan, "[-inf, inf]")


@pytest.mark.parametrize("value", [True, "0.5", None, 1j, [0.5]], ids=repr)
def test_what_is_no_real_number_is_a_type_error(value):
    with pytest.raises(TypeError, match=r"^Owner\(name=.*\): name must be a number in \[0, 1\)\.$"):
        check_in("Owner", "name", value, "[0, 1)")


def test_numbers_of_numpy_are_numbers():
    assert check_in("Owner", "name", np.float32(0.5), "[0, 1)") == 0.5


def test_the_message_shows_owner_argument_value_and_interval():
    with pytest.raises(ValueError, match=r"^AdamW\(beta2=1\.2\): beta2 must be in \[0, 1\)\.$"):
        check_in("AdamW", "beta2", 1.2, "[0, 1)")


def test_an_integer_not_below_the_minimum_passes():
    assert check_int("EMA", "every", 3, minimum=3) == 3


@pytest.mark.parametrize(("value", "error"), [(2, ValueError), (3.0, TypeError), (True, TypeError), ("3", TypeError)])
def test_anything_else_does_not(value, error):
    with pytest.raises(error, match=r"^EMA\(every=.*\): every must be an integer >= 3\.$"):
        check_int("EMA", "every", value, minimum=3)


def test_one_of_the_choices_passes():
    assert check_one_of("AdamW", "rounding", "kahan", ("nearest", "kahan")) is None


@pytest.mark.parametrize("value", ["up", None, 1, ["nearest"]], ids=repr)
def test_the_choices_are_listed(value):
    with pytest.raises(ValueError, match=r"rounding must be one of 'nearest', 'kahan'\.$"):
        check_one_of("AdamW", "rounding", value, ("nearest", "kahan"))


def test_one_is_not_true_and_a_choice_may_come_from_a_generator():
    with pytest.raises(ValueError, match="one of False, True"):
        check_one_of("AdamW", "cautious", 1, (choice for choice in (False, True)))


@pytest.mark.parametrize(
    ("value", "error"), [(1.2, TypeError), (None, TypeError), (["head"], TypeError), ("", ValueError)]
)
def test_a_pattern_is_a_string_that_names_something(value, error):
    with pytest.raises(error, match=r'names must be a shell pattern of names, such as "blocks\.\*"\.$'):
        check_pattern("MaxNorm", "names", value)
    assert check_pattern("MaxNorm", "names", "head.*") == "head.*"
