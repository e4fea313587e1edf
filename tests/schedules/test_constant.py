# SPDX-License-Identifier: Apache-2.0
"""The constant factor."""

import math

import pytest

from lightning_optkit.schedules import constant


@pytest.mark.parametrize("step", [0, 1, 99, 10**9])
def test_is_the_same_at_every_step(step):
    assert constant(0.3)(step) == 0.3
    assert constant()(step, 100) == 1.0


@pytest.mark.parametrize("factor", [-0.1, math.inf, math.nan])
def test_rejects_a_factor_outside_the_range(factor):
    with pytest.raises(ValueError, match=rf"^constant\(factor={factor!r}\): factor must be in \[0, inf\)\.$"):
        constant(factor)
