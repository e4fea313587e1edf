# SPDX-License-Identifier: Apache-2.0
"""The suggestions of a range test, on curves whose places are known."""

import math
import random

import pytest

from lightning_optkit.diagnostics import LRRange, lr_range
from lightning_optkit.diagnostics.lr_range import RULES

LRS = [10 ** (-6 + place / 20) for place in range(121)]  # 1e-6 to 1


def loss(lr, noise=0.0):
    """Falls from 2 around 1e-3, flat from 1e-2, and grows from 0.2 on."""
    draw = random.Random(str(lr)).gauss(0, noise) if noise else 0.0
    return 1 + 1 / (1 + (lr / 1e-3) ** 2) + max(lr / 0.2 - 1, 0) ** 2 + draw


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_places_of_a_curve(noise):
    found = lr_range(LRS, [loss(lr, noise) for lr in LRS])
    assert isinstance(found, LRRange) and tuple(found.suggestions) == RULES and found.reason == ""
    assert found.suggestions["steepest"] == pytest.approx(1e-3, rel=0.4)
    assert 1e-3 < found.suggestions["minimum"] * 10 < 0.3
    # Half of the fall is reached at 1e-3, and a tenth lost again at 0.26, or less by smoothing.
    assert found.suggestions["middle"] == pytest.approx(0.5 * (1e-3 * 0.22) ** 0.5, rel=0.2)
    assert 1e-6 < found.suggestions["valley"] < found.suggestions["middle"]


def test_smoothing_moves_nothing():
    """An exponential average would find the steepest place late."""
    smooth = lr_range(LRS, [loss(lr) for lr in LRS]).smoothed
    assert max(abs(value - loss(lr)) for value, lr in zip(smooth, LRS, strict=True) if lr < 0.1) < 0.05
    line = lr_range(LRS, [float(-place) for place in range(121)]).smoothed
    assert line == pytest.approx([-place for place in range(121)])


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ([1.0] * 121, "the loss does not fall"),
        ([1.0 + place for place in range(121)], "the loss does not fall"),
        ([random.Random(place).gauss(1, 1) for place in range(121)], "the loss does not fall by more than its noise"),
        ([2.0, 1.0, *[math.nan] * 119], "only 2 finite losses"),
    ],
    ids=["flat", "rising", "noise", "short"],
)
def test_no_suggestion_without_a_fall(losses, reason):
    found = lr_range(LRS, losses)
    assert reason in found.reason and set(found.suggestions.values()) == {None}


def test_what_follows_an_infinite_loss_is_left_out():
    losses = [loss(lr) for lr in LRS]
    losses[100:] = [math.inf, *[0.0] * 20]
    found = lr_range(LRS, losses)
    assert len(found.smoothed) == 100 and found.suggestions["middle"] <= LRS[99] / 2


@pytest.mark.parametrize(
    ("lrs", "losses", "message"),
    [
        ([0.1, 0.2], [1.0], r"lr_range\(losses=\.\.\.\): losses must have one entry per rate; 1 for 2"),
        ([0.1, 0.1], [1.0, 1.0], r"lr_range\(lrs=\.\.\.\): lrs must increase"),
        ([0.0, 0.1], [1.0, 1.0], r"lr_range\(lrs=0\.0\): lrs must be in \(0, inf\)"),
    ],
)
def test_bad_arguments_are_refused(lrs, losses, message):
    with pytest.raises(ValueError, match=message):
        lr_range(lrs, losses)


def test_the_plot_shows_every_suggestion():
    found = lr_range(LRS, [loss(lr) for lr in LRS])
    ax = found.plot()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels[:2] == ["loss", "smoothed"] and [label.split(":")[0] for label in labels[2:]] == list(RULES)
    assert ax.get_xscale() == "log"
    assert lr_range(LRS, [1.0] * 121).plot(ax) is ax


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match=r"^lr_range\(losses=\[\]\): each of losses must be a number\.$"):
        lr_range([0.1], [[]])
