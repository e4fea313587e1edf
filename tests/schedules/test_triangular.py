# SPDX-License-Identifier: Apache-2.0
"""Triangular cycles against their corners and torch's CyclicLR in its three modes."""

import pytest
from torch.optim.lr_scheduler import CyclicLR

from lightning_optkit.schedules import triangular

BASE_LR, MIN_FACTOR = 0.4, 0.25


@pytest.mark.parametrize(
    ("step", "height"), [(0, 0.0), (4, 0.5), (8, 1.0), (10, 0.5), (12, 0.0), (20, 1.0), (24, 0.0), (124, 0.5)]
)
def test_values_of_a_rise_of_eight_and_a_fall_of_four(step, height):
    assert triangular(8, 4, min_factor=0.0)(step) == pytest.approx(height, abs=1e-15)
    assert triangular(8, 4, min_factor=0.2)(step) == pytest.approx(0.2 + 0.8 * height, abs=1e-15)
    assert triangular(0.08, 0.04, min_factor=0.0)(step, 100) == pytest.approx(height, abs=1e-12)


def test_each_cycle_of_triangular2_is_half_as_high():
    schedule = triangular(5, min_factor=0.2, mode="triangular2")
    assert [schedule(step) for step in (5, 15, 25)] == pytest.approx([1.0, 0.6, 0.4], rel=1e-12)


def test_exp_range_shrinks_with_every_step():
    schedule = triangular(5, min_factor=0.0, mode="exp_range", gamma=0.9)
    assert [schedule(step) for step in (5, 15)] == pytest.approx([0.9**5, 0.9**15], rel=1e-12)


def test_the_default_ends_at_the_end_of_a_cycle():
    assert triangular()(96, 96) == pytest.approx(MIN_FACTOR, abs=1e-12)
    assert triangular()(84, 96) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("up", "down"), [(7, None), (8, 3), (2, 9)])
@pytest.mark.parametrize(("mode", "gamma"), [("triangular", 1.0), ("triangular2", 1.0), ("exp_range", 0.97)])
def test_follows_torch(assert_follows_torch, up, down, mode, gamma):
    def make_scheduler(optimizer):
        return CyclicLR(
            optimizer, base_lr=MIN_FACTOR * BASE_LR, max_lr=BASE_LR, step_size_up=up, step_size_down=down,
            mode=mode, gamma=gamma, cycle_momentum=False,
        )  # fmt: skip

    # CyclicLR starts its optimizer at base_lr; LambdaLR starts ours at max_lr, which is where the factor is 1.
    assert_follows_torch(triangular(up, down, min_factor=MIN_FACTOR, mode=mode, gamma=gamma), make_scheduler)


def test_rejects_an_unknown_mode():
    with pytest.raises(ValueError, match=r"^triangular\(mode='triangle'\): mode must be one of 'triangular', 'tri"):
        triangular(mode="triangle")


def test_rejects_a_gamma_without_use():
    with pytest.raises(ValueError, match=r"^triangular\(gamma=0.9\): gamma must be 1.0 unless mode is 'exp_range'\.$"):
        triangular(gamma=0.9)


def test_rejects_a_gamma_outside_the_range():
    with pytest.raises(ValueError, match=r"^triangular\(gamma=1.1\): gamma must be in \(0, 1\]\.$"):
        triangular(mode="exp_range", gamma=1.1)


def test_rejects_a_min_factor_outside_the_range():
    with pytest.raises(ValueError, match=r"^triangular\(min_factor=1.1\): min_factor must be in \[0, 1\]\.$"):
        triangular(min_factor=1.1)


@pytest.mark.parametrize("name", ["step_size_up", "step_size_down"])
def test_rejects_a_length_outside_the_range(name):
    with pytest.raises(ValueError, match=rf"^triangular\({name}=-4\): {name} must be an int >= 1"):
        triangular(**{name: -4})


def test_rejects_a_fall_longer_than_the_run():
    with pytest.raises(
        ValueError, match=r"^triangular\(step_size_down=90\): step_size_down must not exceed total_steps"
    ):
        triangular(10, 90)(0, 80)
