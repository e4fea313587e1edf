# SPDX-License-Identifier: Apache-2.0
"""One cycle against its knots and torch's OneCycleLR, of which it also gives the momentum."""

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from lightning_optkit.schedules import one_cycle

BASE_LR, TOTAL = 0.4, 50


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.04), (15, 0.52), (30, 1.0), (65, 0.502), (100, 0.004), (101, 0.004)]
)
@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_values_at_the_knots_and_half_way(step, factor, shape):
    schedule = one_cycle(0.3, final_div_factor=10.0, shape=shape, whole_steps=False)
    assert schedule(step, 100) == pytest.approx(factor, rel=1e-12)


def test_values_of_three_phases():
    schedule = one_cycle(30, div_factor=10.0, final_div_factor=10.0, shape="linear", three_phase=True)
    factors = [schedule(step, 100) for step in (0, 29, 58, 99)]
    assert factors == pytest.approx([0.1, 1.0, 0.1, 0.01], rel=1e-12)


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize(("shape", "anneal_strategy"), [("cosine", "cos"), ("linear", "linear")])
@pytest.mark.parametrize("warmup", [0.3, 0.25, 0.5])
def test_follows_torch(assert_follows_torch, warmup, shape, anneal_strategy, three_phase):
    schedule = one_cycle(warmup, div_factor=20.0, final_div_factor=100.0, shape=shape, three_phase=three_phase)

    def make_scheduler(optimizer):
        return OneCycleLR(
            optimizer, max_lr=BASE_LR, total_steps=TOTAL, pct_start=warmup, anneal_strategy=anneal_strategy,
            div_factor=20.0, final_div_factor=100.0, three_phase=three_phase,
        )  # fmt: skip

    assert_follows_torch(schedule, make_scheduler, steps=TOTAL, total_steps=TOTAL)


def test_upside_down_it_is_the_momentum_of_torch():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=TOTAL, base_momentum=0.85, max_momentum=0.95)
    schedule = one_cycle(div_factor=0.85 / 0.95, final_div_factor=1.0)

    for step in range(TOTAL):
        assert 0.85 * schedule(step, TOTAL) == pytest.approx(optimizer.param_groups[0]["momentum"], rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("total_steps", [1, 2, 3, 4])
def test_ends_at_the_last_step_of_a_tiny_run(total_steps):
    assert one_cycle()(total_steps - 1, total_steps) == pytest.approx(1 / 25e4, rel=1e-12)


def test_a_rise_of_one_step_starts_at_the_peak():
    assert one_cycle(1)(0, 10) == 1.0


def test_rejects_a_run_of_unknown_length():
    with pytest.raises(ValueError, match=r"^one_cycle\(total_steps=None\): .+ because the cycle ends with the run\.$"):
        one_cycle(10)(0)


def test_rejects_three_phases_that_do_not_fit():
    requirement = "warmup must be at most half of the run if three_phase=True"
    with pytest.raises(ValueError, match=rf"^one_cycle\(warmup=0.6\): {requirement}\.$"):
        one_cycle(0.6, three_phase=True)
    with pytest.raises(ValueError, match=rf"^one_cycle\(warmup=60\): {requirement}\.$"):
        one_cycle(60, three_phase=True)(0, 100)


@pytest.mark.parametrize("name", ["div_factor", "final_div_factor"])
def test_rejects_a_ratio_outside_the_range(name):
    with pytest.raises(ValueError, match=rf"^one_cycle\({name}=0.0\): {name} must be in \(0, inf\)\.$"):
        one_cycle(**{name: 0.0})


@pytest.mark.parametrize(("name", "value"), [("shape", "cos"), ("three_phase", 1), ("whole_steps", None)])
def test_rejects_an_unknown_choice(name, value):
    with pytest.raises(ValueError, match=rf"^one_cycle\({name}={value!r}\): {name} must be one of "):
        one_cycle(**{name: value})
