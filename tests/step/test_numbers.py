# SPDX-License-Identifier: Apache-2.0
"""The numbers of a parameter group, read again at every step."""

import math

import pytest
import torch

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm, ClipPerTensor, ClipUnitwise, ClipValue
from lightning_optkit.optimizers import SGD, Adam, AdamW
from lightning_optkit.step.average import AverageKind
from lightning_optkit.step.coefficients import average_weight
from lightning_optkit.step.numbers import compute_dtype, is_due, read_group


def group_of(optimizer_class=AdamW, **kwargs):
    return optimizer_class([torch.ones(1, requires_grad=True)], **kwargs).param_groups[0]


def test_reads_what_a_schedule_wrote_into_the_group():
    group = group_of(lr=torch.tensor(0.5), l1=0.1, rounding="kahan", average=EMA(0.9))
    first = read_group(group, None, EMA(0.9), average_is_due=True)
    group["lr"].fill_(0.25)
    group |= dict(
        weight_decay=0.7, cautious=True, centralize=True, maximize=True, rounding="stochastic", rounding_seed=11, l1=0.2
    )
    group["average_decay"] = 0.99
    second = read_group(group, ClipValue(2.0), EMA(0.9), average_is_due=False)
    assert first == (0.5, 0.01, 1, 0, 0, 0.1, 0, math.inf, math.inf, math.inf, 0, 2, 0, 1, 0.9, 1)
    assert second == (0.25, 0.7, 1, 1, 1, 0.2, 1, 2.0, math.inf, math.inf, 0, 1, 11, 1, 0.99, 0)
    assert read_group(group, None, None, average_is_due=False, owns_decay=True).weight_decay == 0
    third = read_group(group, ClipUnitwise(0.1, eps=0.5), None, average_is_due=False)
    assert (third.clip_value, third.clip_unit_ratio, third.clip_unit_eps) == (math.inf, 0.1, 0.5)
    assert read_group(group, ClipPerTensor(3.0), None, average_is_due=False).clip_tensor_norm == 3.0


def test_no_average_is_kind_zero_and_a_clip_by_norm_bounds_no_element():
    numbers = read_group(group_of(), ClipNorm(1.0), None, average_is_due=False)
    assert (numbers.average_kind, numbers.clip_value) == (0.0, math.inf)


@pytest.mark.parametrize(
    ("optimizer_class", "decoupled"), [(SGD, 0.0), (Adam, 0.0), (AdamW, 1.0)], ids=["SGD", "Adam", "AdamW"]
)
def test_decay_is_decoupled_only_in_adamw(optimizer_class, decoupled):
    assert read_group(group_of(optimizer_class), None, None, average_is_due=False).decoupled == decoupled


def test_the_first_update_of_an_average_copies_and_the_next_are_weighted():
    assert average_weight(AverageKind.EXPONENTIAL, 0.9, num_averaged=0) == 1.0
    assert average_weight(AverageKind.EXPONENTIAL, 0.9, num_averaged=1) == pytest.approx(0.1)
    assert average_weight(AverageKind.UNIFORM, 0.9, num_averaged=3) == pytest.approx(0.25)
    assert average_weight(AverageKind.UNIFORM, 0.9, torch.tensor(3.0)).item() == pytest.approx(0.25)


def test_averages_at_start_and_then_every_so_many_steps():
    assert [step for step in range(1, 16) if is_due(EMA(0.9, start=3, every=4), step)] == [3, 7, 11, 15]
    assert not is_due(None, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_double_precision_is_updated_in_double_precision(dtype):
    assert compute_dtype(torch.empty(0, dtype=dtype)) == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_all_other_dtypes_are_updated_in_single_precision(dtype):
    assert compute_dtype(torch.empty(0, dtype=dtype)) == torch.float32
