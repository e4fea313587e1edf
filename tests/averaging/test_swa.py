# SPDX-License-Identifier: Apache-2.0
"""SWA in the step and in a separate pass, against torch.optim.swa_utils.AveragedModel."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from lightning_optkit.averaging import EMA, SWA
from lightning_optkit.averaging.standalone import averages_of, update_average_
from lightning_optkit.optimizers import SGD, AdamW

PATHS = pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def model_of(dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 1)).to(dtype)


def train(model, optimizer, steps, after=lambda step: None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()
        after(step)


@PATHS
@pytest.mark.parametrize(("start", "every"), [(1, 1), (5, 1), (3, 4), (60, 1)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_folded_and_in_its_own_pass_it_is_torchs_averaged_model(dtype, start, every, fused):
    average = SWA(start=start, every=every)
    models = model_of(dtype), model_of(dtype)
    averaged = AveragedModel(models[0], avg_fn=get_swa_avg_fn())
    folded = AdamW(models[0].parameters(), lr=0.1, average=average, fused=fused)
    own = torch.optim.AdamW(models[1].parameters(), lr=0.1)

    def update(step):
        if step >= start and (step - start) % every == 0:
            averaged.update_parameters(models[0])

    train(models[0], folded, 20, update)
    train(models[1], own, 20, lambda step: update_average_(own, average, step))
    for optimizer, model in ((folded, models[0]), (own, models[1])):
        ours = averages_of(optimizer, average)
        if averaged.n_averaged == 0:
            assert not ours
            continue
        expected = [q.data for q in averaged.module.parameters()]
        actual = [ours[p] for p in model.parameters()]
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype])
        assert {int(optimizer.state[p]["num_averaged"]) for p in model.parameters()} == {int(averaged.n_averaged)}


@PATHS
def test_a_checkpoint_continues_the_average_exactly(fused, snapshot):
    kwargs = dict(lr=0.1, average=SWA(start=3, every=2), fused=fused)
    whole = model_of(torch.bfloat16)
    first_half = AdamW(whole.parameters(), **kwargs)
    train(whole, first_half, 8)
    resumed = copy.deepcopy(whole)
    second_half = AdamW(resumed.parameters(), **kwargs)
    second_half.load_state_dict(copy.deepcopy(first_half.state_dict()))
    for model, optimizer in ((whole, first_half), (resumed, second_half)):
        train(model, optimizer, 7, seed=1)
    assert snapshot(second_half)["state_dict"] == snapshot(first_half)["state_dict"]


@PATHS
def test_another_average_in_its_place_begins_as_a_copy(fused):
    p = torch.zeros(3, requires_grad=True)
    optimizer = SGD([p], lr=1.0, average=EMA(0.5), fused=fused)
    for step in range(4):
        if step == 3:
            optimizer.keep_average(SWA(start=1))
        p.grad = -torch.ones(3)
        optimizer.step()
    assert optimizer.state[p]["swa"].tolist() == p.tolist() == [4.0] * 3
    assert optimizer.state[p]["num_averaged"] == 1


@pytest.mark.parametrize(
    ("start", "total", "step"), [(0.75, 100, 75), (0.75, 6, 5), (1.0, 6, 6), (0.07, 100, 7), (0.001, 6, 1), (9, 6, 9)]
)
def test_a_fraction_of_the_run_is_a_step_of_it(start, total, step):
    assert SWA(start).for_run(total).start == step


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(start=0), ValueError, r"SWA\(start=0\): start must be an int >= 1"),
        (dict(start=0.0), ValueError, r"SWA\(start=0\.0\)"),
        (dict(start=1.5), ValueError, r"SWA\(start=1\.5\)"),
        (dict(start=True), TypeError, r"SWA\(start=True\)"),
        (dict(start="1"), TypeError, r"SWA\(start='1'\)"),
        (dict(every=0), ValueError, r"SWA\(every=0\): every must be an integer >= 1\."),
    ],
    ids=str,
)
def test_refuses_arguments_out_of_range(kwargs, error, message):
    with pytest.raises(error, match=message):
        SWA(**kwargs)


def test_a_fraction_needs_the_length_of_the_run():
    p = torch.zeros(1, requires_grad=True)
    p.grad = torch.ones(1)
    with pytest.raises(
        ValueError, match=r"SGD\(average=SWA\(start=0\.75, every=1\)\): start must be an optimizer step"
    ):
        SGD([p], lr=0.1, average=SWA(0.75))
    with pytest.raises(ValueError, match=r"SWA\(start=0\.75\): start must be an optimizer step.*total_steps=inf"):
        SWA(0.75).for_run(float("inf"))
    with pytest.raises(
        ValueError, match=r"^update_average_\(average=SWA\(start=0\.75, every=1\)\): start must be a step"
    ):
        update_average_(torch.optim.SGD([p]), SWA(0.75), 1)
