# SPDX-License-Identifier: Apache-2.0
"""Learning rates set by a torch scheduler, and by a schedule through torch's LambdaLR."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

BASE_LR = 0.4


def rates_of(make_scheduler, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=BASE_LR, momentum=0.9)
    scheduler = make_scheduler(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.fixture
def assert_follows_torch():
    """Compares a schedule, through LambdaLR, with a torch scheduler of the same base rate, step by step."""

    def check(schedule, make_scheduler, *, steps=60, total_steps=None):
        ours = rates_of(lambda optimizer: LambdaLR(optimizer, lambda step: schedule(step, total_steps)), steps)
        theirs = rates_of(make_scheduler, steps)
        assert len(set(theirs)) > 2  # a constant rate would prove nothing
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)  # torch accumulates rounding where it is recursive

    return check
