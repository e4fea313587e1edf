# SPDX-License-Identifier: Apache-2.0
"""REX against the formula of the paper."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_optkit.schedules import linear, rex


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 1.0), (10, 0.9 / 0.95), (50, 2 / 3), (75, 0.4), (90, 2 / 11), (100, 0.0), (101, 0.0)]
)
def test_values_over_a_hundred_steps(step, factor):
    assert rex()(step, 100) == pytest.approx(factor, abs=1e-15)
    assert rex(min_factor=0.1, steps=100)(step) == pytest.approx(0.1 + 0.9 * factor, abs=1e-15)


@given(step=st.integers(1, 99))
def test_stays_above_the_straight_line(step):
    assert rex()(step, 100) > linear()(step, 100)


def test_rejects_a_min_factor_outside_the_range():
    with pytest.raises(ValueError, match=r"^rex\(min_factor=-1.0\): min_factor must be in \[0, 1\]\.$"):
        rex(-1.0)
