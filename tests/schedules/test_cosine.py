# SPDX-License-Identifier: Apache-2.0
"""Cosine decay against its formula and torch's CosineAnnealingLR."""

import math

import pytest
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_optkit.schedules import cosine


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 1.0), (20, 0.75), (30, 0.5), (40, 0.25), (60, 0.0), (15, (1 + math.sqrt(0.5)) / 2), (61, 0.0), (1000, 0.0)],
)
def test_values_over_sixty_steps(step, factor):
    assert cosine()(step, 60) == pytest.approx(factor, abs=1e-15)
    assert cosine(min_factor=0.2, steps=60)(step) == pytest.approx(0.2 + 0.8 * factor, abs=1e-15)
    assert cosine(steps=0.5)(step, 120) == pytest.approx(factor, abs=1e-15)


def test_follows_torch(assert_follows_torch):
    schedule = cosine(min_factor=0.1)
    make_scheduler = lambda optimizer: CosineAnnealingLR(optimizer, T_max=50, eta_min=0.04)  # noqa: E731
    assert_follows_torch(schedule, make_scheduler, steps=51, total_steps=50)


@pytest.mark.parametrize("min_factor", [-0.1, 1.1, math.nan])
def test_rejects_a_min_factor_outside_the_range(min_factor):
    with pytest.raises(ValueError, match=rf"^cosine\(min_factor={min_factor!r}\): min_factor must be in \[0, 1\]\.$"):
        cosine(min_factor)
