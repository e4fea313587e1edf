# SPDX-License-Identifier: Apache-2.0
"""PowerEMA against the closed formula of its weights (Karras et al. 2024, Appendix C)."""

import math

import pytest
import torch

from lightning_optkit.averaging import PowerEMA
from lightning_optkit.averaging.power_ema import LARGEST_STD, power_exponent
from lightning_optkit.averaging.standalone import averages_of, update_average_
from lightning_optkit.optimizers import SGD, AdamW
from lightning_optkit.step import step_in_backward

PATHS = pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])


def weights_of(std, updates):
    """Of each update in the average: (t / n)^(gamma + 1) - ((t - 1) / n)^(gamma + 1), the product of the decays."""
    gamma = power_exponent(std)
    ends = (torch.arange(updates + 1, dtype=torch.float64) / updates) ** (gamma + 1)
    return ends[1:] - ends[:-1]


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_are_those_of_the_paper(std, gamma):
    assert power_exponent(std) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("std", [0.001, 0.03, 0.05, 0.1, 0.25, 0.288])
def test_the_weights_have_the_standard_deviation_that_was_asked_for(std):
    weights = weights_of(std, 100_000)
    at = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    mean = (weights * at).sum()
    assert float((weights * (at - mean).square()).sum().sqrt()) == pytest.approx(std, rel=1e-4)


def test_the_largest_is_the_plain_mean():
    assert power_exponent(LARGEST_STD) == pytest.approx(0, abs=1e-12)
    assert [PowerEMA(0.288).decay_at(0.0, n) for n in (1, 9)] == pytest.approx([1 / 2, 9 / 10], rel=0.03)


@PATHS
@pytest.mark.parametrize("way", ["step", "in backward", "own pass"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("average", [PowerEMA(0.05), PowerEMA(0.2), PowerEMA(0.1, start=11, every=3)], ids=repr)
def test_it_is_the_closed_formula_over_300_steps(average, dtype, tolerance, way, fused):
    p = torch.zeros(5, dtype=dtype, requires_grad=True)
    optimizer = AdamW([p], lr=0.1, fused=fused, **({} if way == "own pass" else {"average": average}))
    if way == "in backward":
        step_in_backward(optimizer)
    seen = []
    for step in range(1, 301):
        optimizer.zero_grad()
        p.backward(torch.randn(5, generator=torch.Generator().manual_seed(step)).to(dtype))
        optimizer.step()
        if way == "own pass":
            p.grad = torch.zeros_like(p)
            update_average_(optimizer, average, step)
        if step >= average.start and (step - average.start) % average.every == 0:
            seen.append(p.detach().double().clone())
    expected = (torch.stack(seen) * weights_of(average.std, len(seen)).view(-1, 1)).sum(0)
    torch.testing.assert_close(averages_of(optimizer, average)[p].double(), expected, rtol=0, atol=tolerance)


def test_a_second_one_has_its_own_state_and_both_are_saved():
    p = torch.zeros(2, requires_grad=True)
    optimizer = SGD([p], lr=1.0, average=PowerEMA(0.05))
    for step in range(1, 9):
        p.grad = -torch.ones(2)
        optimizer.step()
        update_average_(optimizer, PowerEMA(0.2), step, name="power_ema_2")
    resumed = SGD([torch.zeros(2, requires_grad=True)], lr=1.0, average=PowerEMA(0.05))
    resumed.load_state_dict(optimizer.state_dict())
    state = resumed.state[resumed.param_groups[0]["params"][0]]
    assert float(state["power_ema"][0]) > float(optimizer.state[p]["power_ema_2"][0])
    assert state["power_ema"].tolist() == optimizer.state[p]["power_ema"].tolist()
    assert int(optimizer.state[p]["num_averaged_power_ema_2"]) == 8


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(std=0.0), r"std=0\.0\): std must be in \[1e-4, 0\.288\]\.$"),
        (dict(std=0.3), r"std=0\.3\): std must be in \[1e-4, 0\.288\]\.$"),
        (dict(std=5e-324), r"std=5e-324\): std must be in \[1e-4, 0\.288\]\.$"),
        (dict(std=math.nan), r"std=nan\): std must be in "),
        (dict(start=0), r"start=0\): start must be an int >= 1"),
        (dict(every=0), r"every=0\): every must be an integer >= 1\.$"),
    ],
    ids=str,
)
def test_refuses_arguments_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=r"^PowerEMA\(" + message):
        PowerEMA(**kwargs)


def test_starts_at_an_epoch_or_a_fraction_as_the_others_do():
    assert PowerEMA(0.1, start=0.5).for_run(100) == PowerEMA(0.1, start=50)
    assert PowerEMA(0.1, start=2, start_interval="epoch").for_run(100, 10) == PowerEMA(0.1, start=11)
