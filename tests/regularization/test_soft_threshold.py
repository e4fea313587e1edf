# SPDX-License-Identifier: Apache-2.0
"""The proximal step against its definition: the minimum of threshold * |u| + (u - w)^2 / 2."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_optkit.regularization import soft_threshold_

numbers = st.floats(-5, 5, width=32)


@settings(max_examples=50, deadline=None)
@given(w=numbers, threshold=st.floats(0, 3, width=32))
def test_it_is_the_minimum_that_defines_it(w, threshold):
    weight = torch.tensor([w])
    soft_threshold_([weight], threshold)
    others = torch.linspace(-6, 6, 12001, dtype=torch.float64)
    cost = threshold * others.abs() + 0.5 * (others - w) ** 2
    found = float(weight)
    assert threshold * abs(found) + 0.5 * (found - w) ** 2 <= float(cost.min()) + 1e-6
    assert found == 0 or abs(w) > threshold


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_it_keeps_the_dtype_and_rounds_once(dtype):
    exact = torch.randn(100, dtype=torch.float64).to(dtype)
    weight = exact.clone()
    soft_threshold_([weight], 0.3)
    work = exact.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(weight, (work.sign() * (work.abs() - 0.3).clamp(min=0)).to(dtype))


def test_complex_parameters_are_pairs_and_empty_ones_stay_empty():
    weight, empty = torch.tensor([1.0 - 0.2j]), torch.zeros(0)
    soft_threshold_([weight, empty], 0.5)
    assert weight.item() == 0.5


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"^soft_threshold_\(threshold=-1\.0\): threshold must be in \[0, inf\)\.$"):
        soft_threshold_([], -1.0)
