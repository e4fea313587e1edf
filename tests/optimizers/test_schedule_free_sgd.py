# SPDX-License-Identifier: Apache-2.0
"""Schedule-free SGD against its equations written out (Defazio et al. 2024, 2-4); what both rules share, for both."""

import pytest
import torch

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import ScheduleFreeAdamW, ScheduleFreeSGD
from lightning_optkit.step import step_in_backward

HYPERPARAMETERS = [
    dict(lr=0.05),
    dict(lr=0.05, momentum=0.5, weight_decay=0.1),
    dict(lr=0.05, warmup_steps=20, r=1.0),
    dict(lr=0.05, warmup_steps=100, weight_lr_power=0.0, weight_decay=0.1),
]


def written_out(values, gradients, lr, momentum=0.9, weight_decay=0.0, warmup_steps=0, r=0.0, weight_lr_power=2.0):
    """x, y, z of the paper, each kept by itself."""
    x, z = values.clone(), values.clone()
    weights = 0.0
    for t, g in enumerate(gradients, start=1):
        y = (1 - momentum) * z + momentum * x
        gamma = lr * min(1.0, t / warmup_steps if warmup_steps else 1.0)
        z = z - gamma * (g + weight_decay * y)
        weight = t**r * gamma**weight_lr_power
        weights += weight
        x = (1 - weight / weights) * x + weight / weights * z
    return x, (1 - momentum) * z + momentum * x, z


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (16, 33)], ids=str)
def test_follows_the_algorithm_of_the_paper(shape, hyperparameters, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(shape, dtype=torch.float64), torch.randn(50, *shape, dtype=torch.float64)
    p = values.clone().requires_grad_()
    optimizer = ScheduleFreeSGD([p], **hyperparameters, fused=fused)
    optimizer.train()
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    x, y, z = written_out(values, gradients, **hyperparameters)
    torch.testing.assert_close(p.detach(), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(optimizer.state[p]["z"], z, rtol=1e-12, atol=1e-12)
    optimizer.eval()
    torch.testing.assert_close(p.detach(), x, rtol=1e-12, atol=1e-12)


HYPERS_OF = {
    ScheduleFreeSGD: dict(lr=1.0, weight_decay=1e-3, warmup_steps=10),
    ScheduleFreeAdamW: dict(lr=2e-2, weight_decay=1e-2, warmup_steps=10),
}
each = pytest.mark.parametrize("cls", HYPERS_OF, ids=lambda cls: cls.__name__)


def build(cls, params, **kwargs):
    optimizer = cls(params, **HYPERS_OF[cls], **kwargs)
    optimizer.train()
    return optimizer


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_evaluation_changes_nothing(cls, dtype, train, frozen):
    one, other = [[torch.ones(5, 3, dtype=dtype, requires_grad=True)] for _ in range(2)]
    optimizers = [build(cls, one, rounding="kahan"), build(cls, other, rounding="kahan")]
    train(optimizers, [one, other], steps=7)
    optimizers[0].eval()
    optimizers[0].eval()
    assert dtype == torch.bfloat16 or frozen(one) != frozen(other)  # x may round to y
    optimizers[0].train()
    optimizers[0].train()
    assert frozen(optimizers[0].state_dict()) == frozen(optimizers[1].state_dict())
    train(optimizers, [one, other], steps=7, seed=2)
    assert frozen(one) == frozen(other)


@each
def test_a_state_dict_taken_in_evaluation_goes_on_bit_for_bit(cls, train, frozen):
    one, other = [[torch.ones(5, 3, requires_grad=True)] for _ in range(2)]
    straight, stopped = build(cls, one), build(cls, other)
    train([straight, stopped], [one, other], steps=7)
    assert frozen(stopped.as_evaluated(stopped.state_dict())["state"][0]["y"]) == frozen(one[0])
    stopped.eval()
    resumed = [other[0].detach().clone().requires_grad_()]
    optimizer = cls(resumed, **HYPERS_OF[cls])
    optimizer.load_state_dict(stopped.state_dict())
    assert not optimizer.in_training
    optimizer.train()
    train([straight, optimizer], [one, resumed], steps=7, seed=2)
    assert frozen(one) == frozen(resumed)


@each
def test_a_waiting_y_of_another_shape_is_refused_before_anything_is_loaded(cls):
    p = torch.ones(3, requires_grad=True)
    optimizer = build(cls, [p])
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.eval()
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "y": torch.ones(2)}
    other = build(cls, [torch.ones(3, requires_grad=True)])
    with pytest.raises(ValueError, match=r"the state 'y' has shape \[2\], its parameter \[3\]\.$"):
        other.load_state_dict(saved)
    assert not other.state


@each
def test_a_step_outside_training_is_refused(cls):
    p = torch.ones(1, requires_grad=True)
    optimizer = cls([p])
    p.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match=rf"^{cls.__name__}\.step: the parameters hold the average; call train"):
        optimizer.step()
    optimizer.train()
    optimizer.step()
    optimizer.eval()
    with pytest.raises(RuntimeError, match=rf"^{cls.__name__}\.step: the parameters hold the average"):
        optimizer.step()


@each
def test_a_group_that_comes_in_training_trains_with_the_others(cls):
    first, late = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = build(cls, [first])
    optimizer.train()
    optimizer.add_param_group(dict(params=[late]))
    first.grad, late.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    assert torch.equal(first, late) and first[0] < 1
    optimizer.eval()
    assert torch.equal(first, late) and not optimizer.in_training


@each
def test_an_average_of_y_is_refused_later_too(cls):
    optimizer = build(cls, [torch.ones(1, requires_grad=True)])
    with pytest.raises(ValueError, match=r"must be None; the rule keeps an average itself\.$"):
        optimizer.keep_average(EMA(0.9))
    optimizer.keep_average(None)


@each
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(lr=-1.0), r"lr=-1\.0\): lr must be in \[0, inf\)\.$"),
        (dict(warmup_steps=-1), r"warmup_steps=-1\): warmup_steps must be an integer >= 0\.$"),
        (dict(r=-1.0), r"r=-1\.0\): r must be in \[0, inf\)\.$"),
        (dict(weight_lr_power=-1.0), r"weight_lr_power=-1\.0\): weight_lr_power must be in \[0, inf\)\.$"),
        (dict(l1=0.1), r"l1=0\.1\): must be 0; zeros of y are not zeros of the average\.$"),
        (dict(cautious=True), r"cautious=True\): must be False; y and z decay by the same amount\.$"),
        (dict(average=EMA(0.9)), r"average=EMA.*\): must be None; the rule keeps an average itself\.$"),
    ],
    ids=str,
)
def test_both_refuse_in_one_sentence(cls, kwargs, message):
    with pytest.raises((ValueError, TypeError), match=rf"^{cls.__name__}\({message}"):
        cls([torch.ones(1, requires_grad=True)], **kwargs)


def test_refuses_narrow_state_since_z_is_all_it_keeps():
    message = (
        r"^ScheduleFreeSGD\(state_dtype=torch\.bfloat16\): must be torch\.float32; z is a point, and small steps of "
    )
    with pytest.raises(ValueError, match=message):
        ScheduleFreeSGD([torch.ones(1, requires_grad=True)], state_dtype=torch.bfloat16)


def with_rates(values, gradients, rates, power=2.0, r=0.0, momentum=0.9):
    """x of the paper, where step t has the rate `rates[t]`, warm-up included, and the weight of the greatest so far."""
    x, z, weights, largest = values.clone(), values.clone(), 0.0, 0.0
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        z = z - rate * g
        largest = max(largest, rate)
        weight = t**r * largest**power
        weights += weight
        x = x + (weight / weights if weights else 0.0) * (z - x)
    return x


FALLING = {
    "a jump": [1.0] * 6 + [0.1] * 18,
    "a line": [1 - t / 30 for t in range(24)],
    "down, up, down": [0.5] * 3 + [0.2] * 4 + [0.9] * 3 + [0.3] * 14,
    "after the warm-up": [1.0] * 14 + [0.1] * 10,
    "from zero": [0.0, 0.0, 1.0, 0.5] + [0.25] * 20,
}


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("is_in_backward", [False, True], ids=["step", "in backward"])
@pytest.mark.parametrize("rates", FALLING.values(), ids=FALLING)
def test_weights_follow_the_greatest_rate_so_far_where_it_falls_within_the_warm_up(rates, is_in_backward, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(5, dtype=torch.float64), torch.randn(len(rates), 5, dtype=torch.float64)
    p = values.clone().requires_grad_()
    optimizer = ScheduleFreeSGD([p], lr=1.0, warmup_steps=12, r=0.5, fused=fused)
    optimizer.train()
    if is_in_backward:
        step_in_backward(optimizer)
    for lr, g in zip(rates, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        p.backward(g)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()
    expected = with_rates(values, gradients, [lr * min(1, t / 12) for t, lr in enumerate(rates, start=1)], r=0.5)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


def test_a_skipped_step_of_a_falling_rate_lowers_nothing_and_a_resumed_one_goes_on():
    rates, gradients = FALLING["a line"], torch.randn(24, 5, dtype=torch.float64)
    p = torch.ones(5, dtype=torch.float64, requires_grad=True)
    optimizer = ScheduleFreeSGD([p], lr=1.0, warmup_steps=12, clip=ClipNorm(1e9))
    optimizer.train()
    for t, (lr, g) in enumerate(zip(rates, gradients, strict=True)):
        optimizer.param_groups[0]["lr"] = lr
        for bad in [torch.full_like(g, torch.nan)] * (t in (2, 7)) + [g]:
            p.grad = bad.clone()
            optimizer.step()
        if t == 9:
            saved, optimizer = optimizer.state_dict(), ScheduleFreeSGD([p], lr=1.0, clip=ClipNorm(1e9))
            optimizer.load_state_dict(saved)
    optimizer.eval()
    assert float(optimizer.state[p]["step"]) == 24
    ones, ramp = torch.ones(5, dtype=torch.float64), [lr * min(1, t / 12) for t, lr in enumerate(rates, start=1)]
    torch.testing.assert_close(p.detach(), with_rates(ones, gradients, ramp), rtol=1e-12, atol=1e-12)
