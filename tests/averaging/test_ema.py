# SPDX-License-Identifier: Apache-2.0
"""EMA folded into the step, against torch.optim.swa_utils.AveragedModel."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_optkit.averaging import EMA, SWA
from lightning_optkit.averaging.standalone import update_average_
from lightning_optkit.optimizers import SGD, AdamW
from lightning_optkit.step import step_in_backward

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
        (dict(start=0), ValueError, r"EMA\(start=0\): start must be an int >= 1"),
        (dict(every=0), ValueError, r"EMA\(every=0\): every must be an integer >= 1\."),
        (dict(every=1.5), TypeError, r"EMA\(every=1\.5\)"),
    ],
    ids=str,
)
def test_refuses_arguments_out_of_range(kwargs, error, message):
    with pytest.raises(error, match=message):
        EMA(**kwargs)


# --- warm-up ---


def timm(step, decay, gamma=1.0, power=2 / 3, min_decay=0.0):
    """`ModelEmaV3.get_decay` of timm 1.0 for update `step`, from 1, with `use_warmup`."""
    if step == 1:
        return 0.0
    return max(min(1 - (1 + (step - 1) / gamma) ** -power, decay), min_decay)


def tensorflow(step, decay, min_decay=0.0):
    """`tf.train.ExponentialMovingAverage(decay, num_updates)`, with `num_updates` from 0."""
    return max(min(decay, step / (step + 9)), min_decay) if step > 1 else 0.0


WARMUPS = [
    (EMA(0.9999, warmup="power"), lambda n: timm(n, 0.9999)),
    (EMA(0.9, warmup="power", warmup_gamma=3.0, warmup_power=0.9), lambda n: timm(n, 0.9, 3.0, 0.9)),
    (EMA(0.95, warmup="power", min_decay=0.6), lambda n: timm(n, 0.95, min_decay=0.6)),
    (EMA(0.999, warmup="ratio"), lambda n: tensorflow(n, 0.999)),
    (EMA(0.8, warmup="ratio", min_decay=0.3, start=3, every=2), lambda n: tensorflow(n, 0.8, 0.3)),
]


@PATHS
@pytest.mark.parametrize("way", ["step", "in backward", "own pass"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("average", "decay_of_update"), WARMUPS, ids=[repr(average) for average, _ in WARMUPS])
def test_a_warm_up_has_the_decay_of_its_formula_in_every_update(average, decay_of_update, dtype, way, fused):
    model, expected, updates = model_of(dtype), None, 0
    given = dict(lr=0.1, fused=fused) | ({} if way == "own pass" else {"average": average})
    optimizer = SGD(model.parameters(), **given)
    if way == "in backward":
        step_in_backward(optimizer)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 201):
        for p in model.parameters():
            p.backward(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype))
        optimizer.step()
        optimizer.zero_grad()
        if way == "own pass":
            for p in model.parameters():
                p.grad = torch.zeros_like(p)  # a parameter without one gets no average
            update_average_(optimizer, average, step)
            optimizer.zero_grad()
        if step >= average.start and (step - average.start) % average.every == 0:
            updates += 1
            now, decay = [p.detach().double().clone() for p in model.parameters()], decay_of_update(updates)
            before = now if expected is None else expected
            expected = [decay * e + (1 - decay) * n for e, n in zip(before, now, strict=True)]
    ours = [optimizer.state[p]["ema"].double() for p in model.parameters()]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-5)


@PATHS
def test_a_warm_up_goes_on_after_a_resume_and_for_parameters_that_come_late(fused):
    average, trained = EMA(0.99, warmup="power"), []
    model = model_of(torch.float64)
    optimizer = SGD(model.parameters(), lr=0.1, average=average, fused=fused)
    late = [*model[1].parameters()]
    for step in range(30):
        if step in (7, 15):
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = SGD(model.parameters(), lr=0.1, average=average, fused=fused)
            optimizer.load_state_dict(saved)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, dtype=torch.float64) if p not in set(late) or step % 3 == 2 else None
        optimizer.step()
        trained.append([p.detach().clone() for p in model.parameters()])
    expected = trained[0]
    for n, now in enumerate(trained[1:], start=2):
        decay = timm(n, 0.99)
        expected = [decay * e + (1 - decay) * value for e, value in zip(expected, now, strict=True)]
    # A layer without a gradient in the first two steps has not changed, so its average starts as a copy of it.
    torch.testing.assert_close([optimizer.state[p]["ema"] for p in model[0].parameters()], expected[:2])
    assert {int(optimizer.state[p]["num_averaged"]) for p in model.parameters()} == {30}


@PATHS
def test_the_scheduled_decay_of_a_group_bounds_its_warm_up(fused):
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer, expected = SGD([p], lr=1.0, average=EMA(0.9, warmup="ratio"), fused=fused), None
    for n in range(1, 40):
        optimizer.param_groups[0]["average_decay"] = decay = 0.5 if n > 20 else 0.9
        p.grad = torch.tensor([float(n)], dtype=torch.float64)
        optimizer.step()
        decay = min(decay, n / (n + 9))
        expected = p.item() if expected is None else decay * expected + (1 - decay) * p.item()
    assert optimizer.state[p]["ema"].item() == pytest.approx(expected, rel=1e-12)


def test_another_average_in_its_place_warms_up_anew():
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = SGD([p], lr=1.0, average=SWA(1))
    handle = step_in_backward(optimizer)
    values = []
    for n in range(12):
        if n == 6:
            optimizer.keep_average(EMA(0.999, warmup="ratio"))
        p.backward(torch.tensor([float(n)], dtype=torch.float64))
        optimizer.step()
        values.append(p.item())
    handle.remove()
    expected = values[6]
    for update, value in enumerate(values[7:], start=2):
        expected += (1 - update / (update + 9)) * (value - expected)
    assert optimizer.state[p]["ema"].item() == pytest.approx(expected, rel=1e-12)


# --- start ---


def test_a_start_by_fraction_or_epoch_is_a_step_of_the_run():
    assert EMA(0.9, start=0.25, every=3).for_run(400) == EMA(0.9, start=100, every=3)
    assert EMA(0.9, start=3, start_interval="epoch").for_run(400, steps_per_epoch=50) == EMA(0.9, start=101)
    assert SWA(1, start_interval="epoch").for_run(400, steps_per_epoch=50) == SWA(1)
    assert EMA(0.9, start=7).for_run(400) == EMA(0.9, start=7)
    with pytest.raises(ValueError, match=r"^EMA\(start=2, start_interval='epoch'\): start must be an optimizer step"):
        EMA(0.9, start=2, start_interval="epoch").for_run(400)
    p = torch.zeros(1, requires_grad=True)
    for average in (EMA(0.9, start=0.5), EMA(0.9, start=2, start_interval="epoch")):
        with pytest.raises(ValueError, match=r"^SGD\(average=EMA\(.*\)\): start must be an optimizer step; give "):
            SGD([p], average=average)
        with pytest.raises(ValueError, match=r"^update_average_\(average=EMA\(.*\)\): start must be a step"):
            update_average_(torch.optim.SGD([p]), average, 1)


def test_its_name_in_a_checkpoint_has_the_new_arguments_only_where_they_are_used():
    assert repr(EMA(0.9, 3, 2)) == "EMA(decay=0.9, start=3, every=2)"
    shown = "EMA(decay=0.9, start=0.5, every=1, warmup='power', warmup_gamma=2.0)"
    assert repr(EMA(0.9, 0.5, warmup="power", warmup_gamma=2.0)) == shown
    assert repr(SWA(2, start_interval="epoch")) == "SWA(start=2, every=1, start_interval='epoch')"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(start=1.5), r"start=1\.5\): start must be an int >= 1 \(optimizer step\) or a float in \(0, 1\]"),
        (
            dict(start=0.5, start_interval="epoch"),
            r"start=0\.5\): start must be an int >= 1 with start_interval='epoch",
        ),
        (dict(start_interval="batch"), r"start_interval='batch'\): start_interval must be one of"),
        (dict(warmup="linear"), r"warmup='linear'\): warmup must be one of"),
        (dict(warmup_power=0.5), r"warmup_power=0\.5\): warmup must be 'power'\.$"),
        (dict(warmup="ratio", warmup_gamma=2.0), r"warmup_gamma=2\.0\): warmup must be 'power'\.$"),
        (dict(warmup="power", warmup_gamma=0.0), r"warmup_gamma=0\.0\): warmup_gamma must be in \(0, inf\)\.$"),
        (dict(min_decay=0.5), r"min_decay=0\.5\): warmup must be 'power' or 'ratio'\.$"),
        (dict(decay=0.5, warmup="power", min_decay=0.9), r"min_decay=0\.9\): min_decay must be at most decay, 0\.5\.$"),
    ],
    ids=str,
)
def test_refuses_a_warm_up_or_start_that_is_none(kwargs, message):
    with pytest.raises(ValueError, match=r"^EMA\(" + message):
        EMA(**kwargs)
