# SPDX-License-Identifier: Apache-2.0
"""Natural exponential decay against its formula, and against the exponential law with the same rate."""

import math

import pytest

from lightning_optkit.schedules import exponential, natural_exponential


@pytest.mark.parametrize(
    ("t", "factor"), [(0, 1.0), (1, 0.9607894391523232), (25, 0.36787944117144233), (50, 0.1353352832366127)]
)
def test_values_at_beta_one_twentyfifth(t, factor):
    assert natural_exponential(0.04)(t) == pytest.approx(factor, rel=1e-14)
    assert natural_exponential(0.04, every=20)(20 * t) == pytest.approx(factor, rel=1e-14)
    assert natural_exponential(0.04, every=0.5)(20 * t, 40) == pytest.approx(factor, rel=1e-14)


@pytest.mark.parametrize("step", range(0, 100, 7))
def test_is_the_exponential_law_in_other_words(step):
    assert natural_exponential(0.04)(step) == pytest.approx(exponential(math.exp(-0.04))(step), rel=1e-12)


@pytest.mark.parametrize("beta", [-0.1, math.inf])
def test_rejects_a_beta_outside_the_range(beta):
    with pytest.raises(ValueError, match=rf"^natural_exponential\(beta={beta!r}\): beta must be in \[0, inf\)\.$"):
        natural_exponential(beta)


def test_rejects_a_unit_beyond_the_run_as_a_fraction():
    with pytest.raises(ValueError, match=r"^natural_exponential\(every=2.0\): every must be .+ a float in \(0, 1\]"):
        natural_exponential(0.1, every=2.0)
