# SPDX-License-Identifier: Apache-2.0
"""EMA folded into the step, against torch.optim.swa_utils.AveragedModel."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_optkit.averaging import EMA
from lightning_optkit.optimizers import SGD, AdamW

PATHS = pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
STEPS = 50
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def train(model, optimizer, steps=STEPS, after=lambda step: None, seed=0):
    """`after(step)` runs after each step, counted from 1."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()
        after(step)


def model_of(dtype):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 1)).to(dtype)


@PATHS
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_folded_it_is_torchs_averaged_model(dtype, decay, fused):
    model = model_of(dtype)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    optimizer = AdamW(model.parameters(), lr=0.1, average=EMA(decay), fused=fused)
    train(model, optimizer, after=lambda step: averaged.update_parameters(model))
    ours = [optimizer.state[p]["ema"] for p in model.parameters()]
    torch.testing.assert_close(ours, [q.data for q in averaged.parameters()], rtol=0, atol=TOLERANCE[dtype])
    assert {int(optimizer.state[p]["num_averaged"]) for p in model.parameters()} == {STEPS}


@PATHS
@pytest.mark.parametrize(("start", "every"), [(1, 3), (7, 1), (10, 4), (60, 1)])
def test_starts_at_one_step_and_updates_every_so_many(start, every, fused):
    model = model_of(torch.float64)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = SGD(model.parameters(), lr=0.1, average=EMA(0.9, start=start, every=every), fused=fused)

    def update(step):
        if step >= start and (step - start) % every == 0:
            averaged.update_parameters(model)

    train(model, optimizer, after=update)
    assert {int(optimizer.state[p]["num_averaged"]) for p in model.parameters()} == {int(averaged.n_averaged)}
    if averaged.n_averaged:
        ours = [optimizer.state[p]["ema"] for p in model.parameters()]
        torch.testing.assert_close(ours, [q.data for q in averaged.parameters()], rtol=0, atol=1e-12)


@PATHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_16_bit_parameters_have_an_fp32_average_of_what_is_stored(dtype, rounding, fused):
    model = model_of(dtype)
    optimizer = SGD(model.parameters(), lr=0.1, average=EMA(0.9), rounding=rounding, fused=fused)
    averages = {}

    def update(step):
        for p in model.parameters():
            stored = p.detach().double()
            averages[p] = stored if step == 1 else 0.9 * averages[p] + 0.1 * stored

    train(model, optimizer, after=update)
    for p in model.parameters():
        assert optimizer.state[p]["ema"].dtype == torch.float32
        torch.testing.assert_close(optimizer.state[p]["ema"].double(), averages[p], rtol=0, atol=1e-6)


@PATHS
def test_a_step_without_a_gradient_still_moves_the_average_as_torchs_does(fused):
    model = model_of(torch.float64)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = SGD(model.parameters(), lr=0.1, average=EMA(0.9), fused=fused)
    params = list(model.parameters())
    for step in range(4):
        for p in params:
            p.grad = torch.ones_like(p)
        if step == 2:
            params[0].grad = None
        optimizer.step()
        averaged.update_parameters(model)
    ours = [optimizer.state[p]["ema"] for p in params]
    torch.testing.assert_close(ours, [q.data for q in averaged.parameters()], rtol=0, atol=1e-12)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_continues_the_average_exactly(dtype, fused, snapshot):
    kwargs = dict(lr=0.1, average=EMA(0.9, start=3, every=2), fused=fused)
    whole = model_of(dtype)
    first_half = AdamW(whole.parameters(), **kwargs)
    train(whole, first_half, steps=8)
    resumed = copy.deepcopy(whole)
    second_half = AdamW(resumed.parameters(), **kwargs)
    second_half.load_state_dict(copy.deepcopy(first_half.state_dict()))
    train(whole, first_half, steps=7, seed=1)
    train(resumed, second_half, steps=7, seed=1)
    assert snapshot(second_half)["state_dict"] == snapshot(first_half)["state_dict"]


def test_the_decay_of_a_group_may_be_scheduled():
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = SGD([p], lr=1.0, average=EMA(0.9))
    for decay in (0.9, 0.5):
        optimizer.param_groups[0]["average_decay"] = decay
        p.grad = torch.tensor([-1.0], dtype=torch.float64)
        optimizer.step()
    assert optimizer.state[p]["ema"].item() == 0.5 * 1.0 + 0.5 * 2.0


@PATHS
def test_an_average_begun_in_mid_training_begins_as_a_copy(fused):
    p = torch.zeros(3, requires_grad=True)
    optimizer = SGD([p], lr=1.0, fused=fused)
    for step in range(3):
        p.grad = -torch.ones(3)
        if step == 2:
            optimizer.keep_average(EMA(0.9))
        optimizer.step()
    assert optimizer.state[p]["ema"].tolist() == p.tolist() == [3.0] * 3


def test_keeping_an_average_changes_no_parameter(frozen):
    trained = []
    for average in (None, EMA(0.9)):
        model = model_of(torch.float32)
        train(model, AdamW(model.parameters(), lr=0.1, average=average), steps=3)
        trained.append(frozen(list(model.parameters())))
    assert trained[0] == trained[1]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(decay=1.0), ValueError, r"EMA\(decay=1\.0\): decay must be in \[0, 1\)\."),
        (dict(decay=-0.1), ValueError, r"EMA\(decay=-0\.1\)"),
        (dict(decay="0.9"), TypeError, r"EMA\(decay='0\.9'\)"),
        (dict(start=0), ValueError, r"EMA\(start=0\): start must be an integer >= 1\."),
        (dict(every=0), ValueError, r"EMA\(every=0\): every must be an integer >= 1\."),
        (dict(every=1.5), TypeError, r"EMA\(every=1\.5\)"),
    ],
    ids=str,
)
def test_refuses_arguments_out_of_range(kwargs, error, message):
    with pytest.raises(error, match=message):
        EMA(**kwargs)
