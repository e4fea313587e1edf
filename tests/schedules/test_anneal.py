# SPDX-License-Identifier: Apache-2.0
"""Interpolation between two values: exact at both ends, and correct halfway."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_optkit.schedules._anneal import anneal

HALF_WAY = {"linear": 0.5, "cosine": 0.5, "1-sqrt": 1 - math.sqrt(0.5), "exponential": 0.1}


@pytest.mark.parametrize("shape", HALF_WAY)
@given(start=st.floats(1e-6, 1), end=st.floats(1e-6, 1))
def test_is_exact_at_both_ends(shape, start, end):
    assert anneal(start, end, 0.0, shape) == start
    assert anneal(start, end, 1.0, shape) == end


@pytest.mark.parametrize("shape", HALF_WAY)
@given(start=st.floats(1e-6, 1), end=st.floats(1e-6, 1), progress=st.floats(0, 1))
def test_stays_between_its_ends(shape, start, end, progress):
    low, high = min(start, end), max(start, end)
    assert low * (1 - 1e-14) <= anneal(start, end, progress, shape) <= high * (1 + 1e-14)


@pytest.mark.parametrize(("shape", "factor"), HALF_WAY.items())
def test_half_way(shape, factor):
    start, end = (1.0, 0.01) if shape == "exponential" else (1.0, 0.0)
    assert anneal(start, end, 0.5, shape) == pytest.approx(factor, rel=1e-14)
