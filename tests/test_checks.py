# SPDX-License-Identifier: Apache-2.0
"""The argument checks: the interval as written in mathematics, and messages that name argument, value and range."""

import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lightning_optkit as ok
from lightning_optkit._checks import (
    check_bools,
    check_callable,
    check_generator,
    check_home,
    check_in,
    check_instance,
    check_int,
    check_like,
    check_listed,
    check_mapping,
    check_module,
    check_numbers,
    check_one_of,
    check_path,
    check_pattern,
    check_state,
    check_tensor,
    check_tensors,
    check_text,
    check_whole,
    iterate,
    shown,
)


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


class Awkward:
    """Whatever is asked of it, it raises."""

    def __repr__(self):
        raise OSError("no words")

    __bool__ = __len__ = __iter__ = __repr__


class Two(nn.Sequential):
    pass


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (10**400, "<int of 1329 bits>"),
        (-(10**400), "<int of 1329 bits>"),
        (2**63, "9223372036854775808"),
        (torch.zeros(2, 3), "<Tensor of shape (2, 3), torch.float32>"),
        (nn.Parameter(torch.zeros(1)), "<Parameter of shape (1,), torch.float32>"),
        (nn.Linear, "Linear"),
        (nn.Linear(1, 2), "Linear(in_features=1, out_features=2, bias=True)"),
        (Two(nn.Linear(1, 2), nn.ReLU()), "<Two>"),
        (list(range(10_000)), "[0, 1, 2, 3, 4, 5, ...]"),
        ("two\nlines", r"'two\nlines'"),
        (lambda x: x, "<lambda>"),
        (len, "len"),
        (math.nan, "nan"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_any_value_is_shown_on_one_short_line(value, text):
    assert shown(value) == text


@pytest.mark.parametrize("value", [Awkward(), [Awkward()], {"a": Awkward()}, "x" * 10_000, [[[[["deep"]]]]]], ids=type)
def test_no_value_is_too_awkward_to_be_shown(value):
    text = shown(value)
    assert len(text) < 300
    assert "\n" not in text


@pytest.mark.parametrize("value", [Fraction(1, 2), Decimal("0.5"), np.bool_(True), np.complex64(0.5)], ids=type)
def test_what_tensors_are_not_multiplied_by_is_no_number(value):
    with pytest.raises(TypeError, match=r"^Owner\(name=.*\): name must be a number in \[0, 1\]\.$"):
        check_in("Owner", "name", value, "[0, 1]")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_in("Owner", "name", 10**400, "[0, inf)"), ValueError, "must be in [0, inf), and small enough"),
        (lambda: check_in("Owner", "name", Awkward(), "[0, inf)"), TypeError, "must be a number in [0, inf)."),
        (lambda: check_in("Owner", "name", torch.tensor(0.5), "[0, 1)"), TypeError, "must be a number in [0, 1)."),
        (lambda: check_int("Owner", "name", 2**63, 1), ValueError, "must be an integer >= 1, and less than 2**63."),
        (lambda: check_whole("Owner", "name", True), TypeError, "must be an integer, such as 1 or -1."),
        (lambda: check_whole("Owner", "name", -(10**400)), ValueError, "must be an integer of less than 64 bits."),
        (lambda: check_numbers("Owner", "name", None, 2, "[0, 1]"), TypeError, "must be two numbers in [0, 1]."),
        (lambda: check_numbers("Owner", "name", bytearray(b"ab"), 2, "[0, 1]"), TypeError, "must be two numbers in"),
        (lambda: check_numbers("Owner", "name", "ab", 2, "[0, 1]"), TypeError, "must be two numbers in [0, 1]."),
        (lambda: check_numbers("Owner", "name", (0, 1, 1), 2, "[0, 1]"), ValueError, "must be two numbers in [0, 1]"),
        (lambda: check_numbers("Owner", "name", (0, 2), 2, "[0, 1]"), ValueError, "must be in [0, 1]."),
        (lambda: check_bools("Owner", other=True, name="no"), ValueError, "must be one of False, True."),
        (lambda: check_bools("Owner", name=Awkward()), ValueError, "must be one of False, True."),
        (lambda: check_text("Owner", "name", None, "a name"), TypeError, "must be a name."),
        (lambda: check_text("Owner", "name", "", "a name"), ValueError, "must be a name."),
        (lambda: check_text("Owner", "name", "[", "a pattern", expression=True), ValueError, "must be a pattern, but"),
        (lambda: check_callable("Owner", "name", 3, "name(x)"), TypeError, "must be a function, called as name(x)."),
        (lambda: check_callable("Owner", "name", lambda: 0, "name(x)"), TypeError, "must be a function, called as"),
        (lambda: check_callable("Owner", "name", nn.Linear, "name(x)"), TypeError, "must be a function, called as"),
        (lambda: check_instance("Owner", "name", Two, nn.Module, "a Two"), TypeError, "so call it: Two(...)."),
        (lambda: check_like("Owner", "name", Path, ["stem"], "a path"), TypeError, "so call it: Path(...)."),
        (lambda: check_like("Owner", "name", 3, ["stem"], "a path"), TypeError, "must be a path."),
        (lambda: check_listed("Owner", "name", "ab", "a list"), TypeError, "must be a list."),
        (lambda: check_listed("Owner", "name", {"a": 1}, "a list"), TypeError, "must be a list."),
        (lambda: check_listed("Owner", "name", Awkward(), "a list"), TypeError, "must be a list; reading it raised"),
        (lambda: check_listed("Owner", "name", (), "a list"), ValueError, "must hold at least one."),
        (lambda: iterate("Owner", "name", None, "batches"), TypeError, "must be batches."),
        (lambda: iterate("Owner", "name", Awkward(), "batches"), TypeError, "must be batches."),
        (lambda: check_mapping("Owner", "name", {1: 2}, "a dict"), TypeError, "must be a dict."),
        (lambda: check_path("Owner", "name", 3), TypeError, "must be a path"),
        (lambda: check_path("Owner", "name", "a\0b"), ValueError, "must be a path"),
        (lambda: check_path("Owner", "name", "no/file", exists=True), FileNotFoundError, "and there is none."),
        (lambda: check_path("Owner", "name", "x" * 9999, exists=True), FileNotFoundError, "and there is none."),
        (lambda: check_tensor("Owner", "name", None), TypeError, "must be a tensor."),
        (lambda: check_tensor("Owner", "name", torch.zeros(1).long(), "floating"), TypeError, "must be a floating"),
        (lambda: check_tensor("Owner", "name", torch.zeros(1) * 1j, "real"), TypeError, "must be a real tensor."),
        (lambda: check_tensor("Owner", "name", torch.eye(2).to_sparse()), ValueError, "must be dense"),
        (lambda: check_tensor("Owner", "name", torch.zeros(1, device="meta"), meta=False), ValueError, "must hold num"),
        (lambda: check_tensor("Owner", "name", torch.zeros(()), min_ndim=1), ValueError, "at least 1 dimension."),
        (lambda: check_tensors("Owner", "name", [None]), TypeError, "must be a tensor."),
        (lambda: check_tensors("Owner", "name", iter(()), empty=False), ValueError, "at least one parameter."),
        (lambda: check_module("Owner", "name", nn.Linear), TypeError, "must be a torch.nn.Module."),
        (lambda: check_generator("Owner", 0, "name"), TypeError, "must be None or a torch.Generator, such as"),
    ],
)
def test_what_is_of_another_kind_is_answered_by_owner_argument_and_value(call, error, message):
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert text.startswith("Owner(name") and f"name{'' if 'name[' not in text else '[0]'} must" in text, text
    assert message in text and text.endswith(".") and "\n" not in text


def test_what_is_of_the_right_kind_is_given_back():
    generator, tensor, module = torch.Generator(), torch.zeros(2), nn.Linear(1, 1)
    assert check_numbers("Owner", "name", [0, 0.5], 2, "[0, 1]") == (0, 0.5)
    assert check_callable("Owner", "name", list, "name(text)", classes=True) is list
    assert check_listed("Owner", "name", (i for i in range(2)), "a list") == [0, 1]
    assert check_tensors("Owner", "name", tensor) == [tensor]
    assert check_tensors("Owner", "name", [tensor, None], optional=True)[1] is None
    assert check_module("Owner", "name", module) is module
    assert check_generator("Owner", generator) is generator and check_generator("Owner", None) is None
    assert check_path("Owner", "name", "a/b") == Path("a/b")


@pytest.mark.parametrize(
    ("device", "dtype", "error", "message"),
    [
        (3.5, None, TypeError, 'device must be None or a device, such as "cpu".'),
        (True, None, TypeError, "device must be None or a device"),
        ("nowhere", None, ValueError, "device must be there; torch says"),
        (None, "float32", TypeError, "dtype must be None or a torch.dtype, such as torch.float32."),
        (None, torch.int64, ValueError, "dtype must be floating, such as torch.float32."),
    ],
)
def test_parameters_have_a_home(device, dtype, error, message):
    with pytest.raises(error, match=r"^Owner\((device|dtype)=") as caught:
        check_home("Owner", device, dtype)
    assert message in str(caught.value)
    check_home("Owner", "cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (None, TypeError, "state_dict must be a dict with 'steps', 'name', as saved by Owner."),
        ({}, ValueError, "state_dict must hold 'steps', 'name', as saved by Owner; 'steps' is missing."),
        ({"steps": "1", "name": "a"}, TypeError, "'steps' must be int."),
        ({"steps": True, "name": "a"}, TypeError, "'steps' must be int."),
        ({"steps": -1, "name": "a"}, ValueError, "state_dict must count 'steps' from 0, below 2**63."),
        ({"steps": 1, "name": None}, TypeError, "'name' must be str."),
    ],
)
def test_a_saved_state_is_looked_through_before_it_is_taken(state, error, message):
    with pytest.raises(error, match=r"^Owner\.load_state_dict\(state_dict") as caught:
        check_state("Owner", state, steps=int, name=str)
    assert message in str(caught.value)
    assert check_state("Owner", {"steps": 1, "name": "a"}, steps=int, name=str) == {"steps": 1, "name": "a"}


class AnyClip(ok.ClipNorm):
    """One of a user's own."""


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (ok.GradientClipping, ok.AutoClip),
        (ok.GradientClipping, AnyClip),
        (ok.WeightAveraging, ok.SWA),
        (ok.LRSchedule, ok.Schedule),
        (lambda clip: ok.SGD([torch.ones(1, requires_grad=True)], clip=clip), ok.ClipNorm),
        (lambda average: ok.SGD([torch.ones(1, requires_grad=True)], average=average), ok.EMA),
    ],
    ids=["clip", "of the user", "average", "schedule", "clip of an optimizer", "average of an optimizer"],
)
def test_a_class_that_stands_for_an_object_is_to_be_called(call, name):
    with pytest.raises(TypeError, match=rf"; {name.__name__} is a class, so call it: {name.__name__}\(\.\.\.\)\.$"):
        call(name)


@pytest.mark.parametrize("given", [ok.EMA, int, ok.Fuse])
def test_another_class_is_not(given):
    with pytest.raises(TypeError, match=r"clip must be a clip such as ClipNorm\(1\.0\)\.$"):
        ok.GradientClipping(given)
