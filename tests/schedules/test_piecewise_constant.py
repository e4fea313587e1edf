# SPDX-License-Identifier: Apache-2.0
"""Piecewise constant decay against its table and torch's StepLR and MultiStepLR."""

import pytest
from torch.optim.lr_scheduler import MultiStepLR, StepLR

from lightning_optkit.schedules import piecewise_constant


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 1.0), (29, 1.0), (29.9, 1.0), (30, 0.5), (59, 0.5), (60, 0.1), (99, 0.1), (100, 0.1), (500, 0.1)],
)
def test_values(step, factor):
    assert piecewise_constant([30, 60], [1.0, 0.5, 0.1])(step) == factor
    assert piecewise_constant([0.3, 60], [1.0, 0.5, 0.1])(step, 100) == factor


def test_may_rise_and_may_stop():
    schedule = piecewise_constant([1, 2], [0.5, 2.0, 0.0])
    assert [schedule(step) for step in range(3)] == [0.5, 2.0, 0.0]


def test_one_piece_needs_no_milestone():
    assert piecewise_constant([], [0.5])(7) == 0.5


def test_follows_torch_multi_step(assert_follows_torch):
    schedule = piecewise_constant([7, 20, 33], [1.0, 0.3, 0.09, 0.027])
    assert_follows_torch(schedule, lambda optimizer: MultiStepLR(optimizer, milestones=[7, 20, 33], gamma=0.3))


def test_follows_torch_step(assert_follows_torch):
    schedule = piecewise_constant([15, 30, 45], [1.0, 0.1, 0.01, 0.001])
    assert_follows_torch(schedule, lambda optimizer: StepLR(optimizer, step_size=15, gamma=0.1))


@pytest.mark.parametrize("milestones", [(60, 30), (30, 30), (0.6, 0.3), (30, 0.5, 20), (0.5, 30, 0.4)])
def test_rejects_overlapping_pieces(milestones):
    with pytest.raises(
        ValueError, match=r"^piecewise_constant\(milestones=\(.+\)\): milestones must increase strictly"
    ):
        piecewise_constant(milestones, [1.0] * (len(milestones) + 1))


def test_rejects_pieces_that_overlap_in_this_run():
    schedule = piecewise_constant([0.5, 60], [1.0, 0.5, 0.1])
    assert schedule(55, 100) == 0.5
    with pytest.raises(ValueError, match=r"^piecewise_constant\(milestones=\(0.5, 60\)\): milestones must increase"):
        schedule(0, 200)


@pytest.mark.parametrize("factors", [[1.0], [1.0, 0.5, 0.25]])
def test_rejects_the_wrong_number_of_factors(factors):
    with pytest.raises(ValueError, match=r"factors must have one value more than the 1 milestones\.$"):
        piecewise_constant([10], factors)


def test_rejects_a_negative_factor():
    with pytest.raises(ValueError, match=r"^piecewise_constant\(factors=-0.5\): factors must be in \[0, inf\)\.$"):
        piecewise_constant([10], [1.0, -0.5])


@pytest.mark.parametrize("milestone", [-10, 0, 1.5])
def test_rejects_a_milestone_outside_the_range(milestone):
    with pytest.raises(
        ValueError, match=rf"^piecewise_constant\(milestones={milestone}\): milestones must be an int >="
    ):
        piecewise_constant([milestone], [1.0, 0.5])
