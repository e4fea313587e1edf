# SPDX-License-Identifier: Apache-2.0
"""Inverse time decay against its formula."""

import math

import pytest

from lightning_optkit.schedules import inverse_time


@pytest.mark.parametrize(("t", "factor"), [(0, 1.0), (1, 1 / 1.1), (10, 0.5), (90, 0.1), (990, 0.01)])
def test_values_at_beta_one_tenth(t, factor):
    assert inverse_time(0.1)(t) == pytest.approx(factor, rel=1e-15)
    assert inverse_time(0.1, every=20)(20 * t) == pytest.approx(factor, rel=1e-15)
    assert inverse_time(0.1, every=0.5)(20 * t, 40) == pytest.approx(factor, rel=1e-15)


def test_beta_zero_never_decays():
    assert inverse_time(0.0)(10**6) == 1.0


@pytest.mark.parametrize("beta", [-0.1, math.inf, math.nan])
def test_rejects_a_beta_outside_the_range(beta):
    with pytest.raises(ValueError, match=rf"^inverse_time\(beta={beta!r}\): beta must be in \[0, inf\)\.$"):
        inverse_time(beta)


def test_rejects_a_unit_of_zero():
    with pytest.raises(ValueError, match=r"^inverse_time\(every=0\): every must be an int >= 1"):
        inverse_time(0.1, every=0)
