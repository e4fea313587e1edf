# SPDX-License-Identifier: Apache-2.0
"""Exponential decay against its formula and torch's ExponentialLR."""

import pytest
from torch.optim.lr_scheduler import ExponentialLR

from lightning_optkit.schedules import exponential


@pytest.mark.parametrize(("t", "factor"), [(0, 1.0), (1, 0.5), (2, 0.25), (0.5, 0.5**0.5), (10, 1 / 1024)])
def test_values_at_beta_one_half(t, factor):
    assert exponential(0.5)(t) == pytest.approx(factor, rel=1e-15)
    assert exponential(0.5, every=20)(20 * t) == pytest.approx(factor, rel=1e-15)
    assert exponential(0.5, every=0.5)(20 * t, 40) == pytest.approx(factor, rel=1e-15)


def test_follows_torch(assert_follows_torch):
    assert_follows_torch(exponential(0.9), lambda optimizer: ExponentialLR(optimizer, gamma=0.9))


@pytest.mark.parametrize("beta", [0.0, -0.5, 1.01])
def test_rejects_a_beta_outside_the_range(beta):
    with pytest.raises(ValueError, match=rf"^exponential\(beta={beta!r}\): beta must be in \(0, 1\]\.$"):
        exponential(beta)


def test_rejects_a_negative_unit():
    with pytest.raises(ValueError, match=r"^exponential\(every=-5\): every must be an int >= 1"):
        exponential(0.5, every=-5)
