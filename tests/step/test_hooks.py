# SPDX-License-Identifier: Apache-2.0
"""torch's step hooks run around our step in torch's order, and its profiler record is made."""

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_optkit.optimizers import SGD, AdamW, ScheduleFreeSGD


def one(cls):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = cls([p], lr=0.1)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


@pytest.mark.parametrize("cls", [SGD, AdamW, ScheduleFreeSGD, torch.optim.SGD])
def test_hooks_run_in_torchs_order_and_stop_when_they_are_removed(cls):
    seen = []
    optimizer = one(cls)
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre")),
        optimizer.register_step_post_hook(lambda *_: seen.append("post")),
    ]
    optimizer.step()
    assert seen == ["global pre", "pre", "post", "global post"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(seen) == 4


@pytest.mark.parametrize("cls", [SGD, torch.optim.SGD])
def test_a_hook_may_change_the_arguments(cls):
    optimizer = one(cls)
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer,), {"closure": lambda: 7.0}))
    assert optimizer.step() == 7.0


@pytest.mark.parametrize("cls", [SGD, AdamW, torch.optim.SGD])
def test_a_profiler_sees_the_step_under_torchs_name(cls):
    optimizer = one(cls)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    names = [event.key for event in profile.key_averages()]
    assert f"Optimizer.step#{cls.__name__}.step" in names


def test_the_step_of_a_scheduler_and_of_a_scaler_find_what_they_look_for():
    optimizer = one(SGD)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps `step`, and warns unless it sees it called
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
