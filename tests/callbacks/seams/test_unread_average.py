# SPDX-License-Identifier: Apache-2.0
"""An average in an optimizer of this package that no callback takes: one warning, and none where something takes it."""

import re

import pytest
import torch

from lightning_optkit.averaging import EMA, LAWA
from lightning_optkit.callbacks import Fuse, GradientHealth, LRSchedule, Report, WeightAveraging
from lightning_optkit.optimizers import AdamW
from lightning_optkit.schedules import cosine

TEXT = "which nothing evaluates"
SAID = (
    "AdamW keeps EMA(decay=0.5, start=1, every=1), which nothing evaluates or saves as weights: add WeightAveraging("
    "EMA(decay=0.5, start=1, every=1)) in place of average=, or read it by lightning_optkit.averaging.averages_of."
)


def ours(module):
    return AdamW(module.parameters(), average=EMA(0.5))


@pytest.mark.parametrize(
    "make",
    [
        lambda: [Fuse(verbose=False)],
        lambda: [GradientHealth()],
        lambda: [Report(write=False, verbose=False)],
        lambda: [Fuse(verbose=False), Report(write=False, verbose=False), GradientHealth()],
        lambda: [WeightAveraging(LAWA(2)), Fuse(verbose=False)],
    ],
    ids=["Fuse", "GradientHealth", "Report", "several", "beside LAWA"],
)
def test_it_is_said_once_in_a_fit(regression, warned, make):
    for _ in range(2):
        assert warned(TEXT, regression(ours), *make()) == [SAID]


@pytest.mark.parametrize("evaluate", [True, False])
def test_nothing_is_said_where_it_is_taken(regression, warned, evaluate):
    stack = [Fuse(verbose=False), WeightAveraging(EMA(0.5), evaluate=evaluate), Report(write=False, verbose=False)]
    assert warned(TEXT, regression(ours), *stack) == []


def test_nothing_is_said_of_an_optimizer_without_an_average(regression, warned):
    stack = [Fuse(verbose=False), LRSchedule(cosine(), verbose=False)]
    assert warned(TEXT, regression(lambda m: AdamW(m.parameters())), *stack) == []
    assert warned(TEXT, regression(lambda m: torch.optim.AdamW(m.parameters())), *stack) == []


def test_what_it_advises_is_accepted(regression, warned):
    advised = re.search(r"add (WeightAveraging\(.*\)) in place", SAID)[1]
    averaging = eval(advised, {"WeightAveraging": WeightAveraging, "EMA": EMA})
    assert warned(TEXT, regression(lambda m: AdamW(m.parameters())), averaging) == []
    assert averaging.num_averaged == 6
