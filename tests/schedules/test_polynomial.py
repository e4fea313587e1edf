# SPDX-License-Identifier: Apache-2.0
"""Polynomial decay against its formula and torch's PolynomialLR."""

import math

import pytest
from torch.optim.lr_scheduler import PolynomialLR

from lightning_optkit.schedules import linear, polynomial


@pytest.mark.parametrize(
    ("power", "step", "factor"),
    [(1.0, 0, 1.0), (1.0, 3, 0.7), (2.0, 5, 0.25), (2.0, 10, 0.0), (0.5, 9.99, math.sqrt(1e-3)), (3.0, 1, 0.729)],
)
def test_values_over_ten_steps(power, step, factor):
    assert polynomial(power)(step, 10) == pytest.approx(factor, rel=1e-12, abs=1e-15)
    assert polynomial(power, min_factor=0.5, steps=10)(step) == pytest.approx(0.5 + 0.5 * factor, rel=1e-12)


def test_stays_at_the_end():
    assert polynomial(2.0, min_factor=0.25, steps=10)(11) == 0.25


@pytest.mark.parametrize("step", range(12))
def test_power_one_is_linear(step):
    assert polynomial()(step, 10) == pytest.approx(linear()(step, 10), abs=1e-15)


@pytest.mark.parametrize("power", [0.9, 1.0, 2.5])
def test_follows_torch(assert_follows_torch, power):
    make_scheduler = lambda optimizer: PolynomialLR(optimizer, total_iters=45, power=power)  # noqa: E731
    assert_follows_torch(polynomial(power, steps=45), make_scheduler)


@pytest.mark.parametrize("power", [0.0, -1.0, math.inf])
def test_rejects_a_power_outside_the_range(power):
    with pytest.raises(ValueError, match=rf"^polynomial\(power={power!r}\): power must be in \(0, inf\)\.$"):
        polynomial(power)


def test_rejects_a_min_factor_outside_the_range():
    with pytest.raises(ValueError, match=r"^polynomial\(min_factor=2.0\): min_factor must be in \[0, 1\]\.$"):
        polynomial(1.0, min_factor=2.0)
