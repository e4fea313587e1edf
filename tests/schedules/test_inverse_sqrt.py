# SPDX-License-Identifier: Apache-2.0
"""Inverse square root decay against Vaswani's formula."""

import math

import pytest

from lightning_optkit.schedules import inverse_sqrt

D_MODEL, WARMUP = 512, 4_000


@pytest.mark.parametrize("step", [1, 100, 3_999, 4_000, 4_001, 16_000, 100_000])
def test_is_the_formula_of_the_paper_over_its_peak(step):
    rate = D_MODEL**-0.5 * min(step**-0.5, step * WARMUP**-1.5)
    peak = D_MODEL**-0.5 * WARMUP**-0.5
    assert inverse_sqrt(WARMUP, start_factor=0.0)(step) == pytest.approx(rate / peak, rel=1e-12)


@pytest.mark.parametrize(("step", "factor"), [(0, 0.01), (50, 0.505), (100, 1.0), (400, 0.5), (900, 1 / 3)])
def test_values_with_a_start_above_zero(step, factor):
    assert inverse_sqrt(100)(step) == pytest.approx(factor, rel=1e-14)
    assert inverse_sqrt(0.1)(step, 1_000) == pytest.approx(factor, rel=1e-14)


def test_is_continuous_at_the_peak():
    below, above = math.nextafter(100, 0), math.nextafter(100, 200)
    assert inverse_sqrt(100)(below) == pytest.approx(1.0, abs=1e-12)
    assert inverse_sqrt(100)(above) == pytest.approx(1.0, abs=1e-12)


def test_rejects_no_warm_up():
    with pytest.raises(ValueError, match=r"^inverse_sqrt\(warmup=0\): warmup must be an int >= 1"):
        inverse_sqrt(0)


def test_rejects_a_start_outside_the_range():
    with pytest.raises(ValueError, match=r"^inverse_sqrt\(start_factor=1.5\): start_factor must be in \[0, 1\]\.$"):
        inverse_sqrt(10, start_factor=1.5)


def test_rejects_a_warm_up_longer_than_the_run():
    with pytest.raises(ValueError, match=r"^inverse_sqrt\(warmup=50\): warmup must not exceed total_steps=40\.$"):
        inverse_sqrt(50)(0, 40)
