# SPDX-License-Identifier: Apache-2.0
"""The straight line against its formula and torch's LinearLR."""

import pytest
from torch.optim.lr_scheduler import LinearLR

from lightning_optkit.schedules import linear


@pytest.mark.parametrize(("step", "factor"), [(0, 1.0), (1, 0.9), (2.5, 0.75), (5, 0.5), (10, 0.0), (11, 0.0)])
def test_values_over_ten_steps(step, factor):
    assert linear()(step, 10) == pytest.approx(factor, abs=1e-15)
    assert linear(steps=10)(step) == pytest.approx(factor, abs=1e-15)
    assert linear(0.2, 0.8)(step, 10) == pytest.approx(0.8 - 0.6 * factor, abs=1e-15)


@pytest.mark.parametrize(("start", "end"), [(1 / 3, 1.0), (1.0, 0.0), (0.7, 0.2)])
def test_follows_torch(assert_follows_torch, start, end):
    make_scheduler = lambda optimizer: LinearLR(optimizer, start, end, total_iters=40)  # noqa: E731
    # torch's recursion divides by the current rate, so compare until just before it reaches zero
    assert_follows_torch(linear(start, end, steps=40), make_scheduler, steps=40 if end == 0 else 60)


@pytest.mark.parametrize(("arguments", "name"), [((-0.1, 1.0), "start_factor"), ((1.0, 1.5), "end_factor")])
def test_rejects_a_factor_outside_the_range(arguments, name):
    with pytest.raises(ValueError, match=rf"^linear\({name}=\S+\): {name} must be in \[0, 1\]\.$"):
        linear(*arguments)
