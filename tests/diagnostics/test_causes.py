# SPDX-License-Identifier: Apache-2.0
"""A small sample of the benchmark of causes, whose whole is `python -m tests.diagnostics.benchmark.causes`."""

import pytest
import torch
from torch import nn

from tests.diagnostics.benchmark import causes, consequences, families
from tests.diagnostics.benchmark import families_of_causes as networks

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("of", ["dead bias", "vanishing inputs"])
def test_the_cause_is_named_first(of):
    consequence, _, name = of.partition(" ")
    row = causes.run(consequence, name, 0, held_out=False)
    assert row["counts"] and row["named"], row


def test_families_are_apart_and_fit_some_way_of_every_cause():
    calibration, held_out = (
        {*networks.RELU, *networks.SQUASHING},
        {*networks.RELU_HELD_OUT, *networks.SQUASHING_HELD_OUT},
    )
    assert not calibration & (held_out | {*families.HELD_OUT}) and not held_out & {*families.CALIBRATION}
    for cause in causes.CAUSES:
        for is_held_out in (False, True):
            setups = [families.build(f, seed) for f in causes.chosen(cause.consequence, is_held_out) for seed in (0, 1)]
            assert any(map(cause.fits, setups)), cause


def test_consequences_are_measured():
    setup = families.build(networks.mlp, 0)
    module = nn.Sequential(setup.body, setup.head)
    assert consequences.dead_share(setup, module) < 0.2 and consequences.fading(setup, module) > 0.01
    nn.init.constant_(setup.body[0].bias, -100.0)
    assert consequences.dead_share(setup, module) == 1.0 and consequences.fading(setup, module) == 0.0
    nn.init.constant_(setup.head.weight, torch.nan)
    nn.init.constant_(setup.body[0].weight, torch.nan)
    assert consequences.dead_share(setup, module) != consequences.dead_share(setup, module)
