# SPDX-License-Identifier: Apache-2.0
"""Averages of split weights are those of the whole numbers."""

import pytest
import torch
from torch import nn

from lightning_optkit import optimizers
from lightning_optkit.averaging import EMA, SWA
from lightning_optkit.averaging.standalone import update_average_
from lightning_optkit.optimizers import AdamW
from tests.step.split_weights_cases import pair, step_together


def test_an_average_of_a_parameter_without_a_gradient_is_that_of_the_whole_number():
    torch.manual_seed(0)
    starts = [torch.randn(33).bfloat16() for _ in range(2)]
    split, whole = (
        [start.detach().to(dtype, copy=True).requires_grad_() for start in starts]
        for dtype in (torch.bfloat16, torch.float32)
    )
    one = AdamW(split, lr=1e-3, average=EMA(0.9), rounding="split32")
    other = AdamW(whole, lr=1e-3, average=EMA(0.9))
    for step in range(6):
        for p, q in zip(split, whole, strict=True):
            p.grad = torch.randn(33).bfloat16()
            q.grad = p.grad.float()
        if step >= 3:
            split[1].grad = whole[1].grad = None
        one.step()
        other.step()
    for p, q in zip(split, whole, strict=True):
        assert torch.equal(one.state[p]["ema"], other.state[q]["ema"])


@pytest.mark.parametrize("name", ["ScheduleFreeSGD", "ScheduleFreeAdamW"])
def test_the_average_of_a_schedule_free_rule_is_that_of_the_whole_number(name):
    model = nn.Linear(40, 19, bias=False).bfloat16()
    split, cls = model.weight, getattr(optimizers, name)
    whole = split.detach().float().requires_grad_()
    one, other = cls(model.parameters(), lr=0.1, rounding="split32"), cls([whole], lr=0.1)
    for optimizer in (one, other):
        optimizer.train()
    step_together(split, one, whole, other, 6)
    trained = one.full_precision_state_dict(model)["weight"]
    assert torch.equal(trained, whole)
    for optimizer in (one, other):
        optimizer.eval()
    assert torch.equal(split, whole.bfloat16())
    assert torch.equal(one.full_precision_state_dict(model)["weight"], whole)
    one.train()
    assert torch.equal(one.full_precision_state_dict(model)["weight"], trained)


@pytest.mark.parametrize("average", [EMA(0.9), SWA(2)], ids=lambda each: each.state_name)
def test_a_second_average_is_of_the_whole_number_too(average):
    split, one, whole, other = pair(AdamW, dict(lr=1e-3))
    for step in range(1, 7):
        step_together(split, one, whole, other, 1, seed=step)
        update_average_(one, average, step, name="second")
        update_average_(other, average, step, name="second")
    assert torch.equal(one.state[split]["second"], other.state[whole]["second"])
