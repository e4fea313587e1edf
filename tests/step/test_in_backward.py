# SPDX-License-Identifier: Apache-2.0
"""Steps inside the backward pass: the same results as an ordinary step, and no gradients left."""

import copy
import math
import weakref

import pytest
import torch
from torch import nn

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import AutoClip, ClipNorm, ClipPerTensor, ClipUnitwise, ClipValue
from lightning_optkit.optimizers import SGD, AdamW
from lightning_optkit.step import step_in_backward

CASES = {
    "plain": (SGD, dict(lr=0.1)),
    "momentum": (SGD, dict(lr=0.1, momentum=0.9, clip=ClipValue(0.01))),
    "tensor": (AdamW, dict(lr=0.02, clip=ClipPerTensor(0.01), average=EMA(0.9, start=2, every=2))),
    "unit": (AdamW, dict(lr=0.02, clip=ClipUnitwise(0.01), centralize=True, state_dtype="int8")),
    "kahan": (AdamW, dict(lr=0.02, rounding="kahan", statistics=True)),
}


class Tied(nn.Module):
    """One weight used twice, one not at all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 2)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


def train(name, in_backward, fused, steps=6, dtype=torch.float32, between=None):
    net = Tied().to(dtype)
    optimizer_class, kwargs = CASES[name]
    optimizer = optimizer_class(net.parameters(), fused=fused, **copy.deepcopy(kwargs))
    handle = step_in_backward(optimizer) if in_backward else None
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = torch.randn(8, 6, generator=generator).to(dtype)
        net(x).square().mean().backward()
        if in_backward:
            assert all(p.grad is None for p in net.parameters())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if between is not None and step == 2:
            between(optimizer)
    return net, optimizer, handle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_an_ordinary_step(name, fused, dtype):
    net, optimizer, _ = train(name, True, fused, dtype=dtype)
    expected, ordinary, _ = train(name, False, fused, dtype=dtype)
    for p, q in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
        assert optimizer.state[p].keys() == ordinary.state[q].keys()
        for key, value in ordinary.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key], value, rtol=0, atol=0, msg=key)


def test_a_state_dict_that_is_loaded_in_between_is_used():
    def reload(optimizer):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    net, optimizer, _ = train("tensor", True, None, between=reload)
    expected, _, _ = train("tensor", False, None)
    torch.testing.assert_close(net.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert all(state["step"] == 6 for state in optimizer.state.values() if state)


def test_gradients_are_freed_one_after_another():
    freed = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            freed.append([p.grad is None for p in params])
            return grad

    layers = [nn.Linear(4, 4) for _ in range(3)]
    params = [p for layer in layers for p in layer.parameters()]
    step_in_backward(SGD(params, lr=0.1))
    x = torch.randn(2, 4)
    for layer in layers:
        x = layer(Watch.apply(x))
    before = [p.detach().clone() for p in params]
    x.sum().backward()
    assert freed == [[True] * 6] * 2
    assert all(not torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_a_gradient_that_is_not_finite_leaves_its_parameter_out():
    p, q = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    step_in_backward(SGD([p, q], lr=0.5, clip=ClipPerTensor(10.0)))
    (p * torch.tensor([math.inf, 1.0]) + q).sum().backward()
    assert p.tolist() == [1.0, 1.0]
    assert q.tolist() == [0.5, 0.5]


def test_removed_the_ordinary_step_is_back():
    p = torch.ones(2, requires_grad=True)
    optimizer = SGD([p], lr=0.5)
    handle = step_in_backward(optimizer)
    with pytest.raises(ValueError, match=r"^step_in_backward\(SGD\): it is in place already\.$"):
        step_in_backward(optimizer)
    handle.remove()
    p.sum().backward()
    assert p.tolist() == [1.0, 1.0]
    optimizer.step()
    assert p.tolist() == [0.5, 0.5]


def test_it_keeps_no_optimizer_alive():
    p = torch.ones(2, requires_grad=True)
    optimizer = SGD([p], lr=0.5)
    step_in_backward(optimizer)
    reference = weakref.ref(optimizer)
    copy.deepcopy(optimizer)
    del optimizer
    import gc

    gc.collect()
    assert reference() is None
    p.sum().backward()
    assert p.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("clip", [ClipNorm(1.0), AutoClip(10)], ids=repr)
def test_a_clip_by_the_global_norm_is_refused_with_the_reason(clip):
    optimizer = SGD([torch.ones(1, requires_grad=True)], clip=clip)
    with pytest.raises(ValueError, match=r"^step_in_backward\(SGD\): .* needs the norm of all gradients, .* use Clip"):
        step_in_backward(optimizer)


def test_a_loss_scaler_is_refused():
    p = torch.ones(1, requires_grad=True)
    optimizer = SGD([p])
    step_in_backward(optimizer)
    optimizer.grad_scale = torch.tensor(2.0)
    with pytest.raises(RuntimeError, match="a loss scaler must see all gradients"):
        p.sum().backward()


# --- groups, settings and parameters as they are when a gradient arrives ---


def backward(*params):
    sum((p * p).sum() for p in params).backward()


def test_a_parameter_that_left_the_optimizer_is_left_alone_and_one_that_came_waits_for_step():
    left, stays, came = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = SGD([left, stays], lr=0.25)
    step_in_backward(optimizer)
    optimizer.param_groups[0]["params"] = [stays, came]
    backward(left, stays, came)
    assert (left.tolist(), left.grad.tolist()) == ([1] * 3, [2] * 3)
    assert (stays.tolist(), stays.grad) == ([0.5] * 3, None)
    assert came.tolist() == [1] * 3
    optimizer.step()
    assert came.tolist() == [0.5] * 3


@pytest.mark.parametrize("how", ["moved", "replaced", "reversed"])
def test_each_parameter_takes_the_rate_of_the_group_that_it_is_in_now(how):
    a, b = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = SGD([dict(params=[a], lr=0.25), dict(params=[b], lr=0.5)])
    step_in_backward(optimizer)
    backward(a, b)
    assert (a.tolist(), b.tolist()) == ([0.5] * 3, [0.0] * 3)
    with torch.no_grad():
        b.fill_(1.0)
    first, second = optimizer.param_groups
    if how == "moved":
        first["params"], second["params"] = [], [b, a]
    elif how == "replaced":
        optimizer.param_groups = [{**first, "params": [b]}, {**second, "params": [a]}]
    else:
        optimizer.param_groups.reverse()
        first["lr"], second["lr"] = 0.5, 0.25
    backward(a, b)
    rate_of_b = {"moved": 0.5, "replaced": 0.25, "reversed": 0.25}[how]
    assert (a.tolist(), b.tolist()) == ([0.0] * 3, [1 - 2 * rate_of_b] * 3)


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("change", ["momentum", "average", "no average", "rounding"])
def test_what_is_switched_on_or_off_meanwhile_acts_as_in_an_ordinary_step(change, fused):
    def between(optimizer):
        if change == "momentum":
            optimizer.param_groups[0]["momentum"] = 0.9
        elif "average" in change:
            optimizer.keep_average(EMA(0.5) if change == "average" else None)
        else:
            optimizer.param_groups[0]["rounding"] = "kahan"

    found = []
    for in_backward in (True, False):
        p = nn.Parameter(torch.linspace(0.1, 1.0, 40).to(torch.bfloat16))
        optimizer = SGD([p], lr=0.05, average=EMA(0.9) if change == "no average" else None, fused=fused)
        if in_backward:
            step_in_backward(optimizer)
        for step in range(5):
            if step == 2:
                between(optimizer)
            backward(p)
            optimizer.step()
            optimizer.zero_grad()
        found.append((p.detach(), {name: t for name, t in optimizer.state[p].items() if isinstance(t, torch.Tensor)}))
    (mine, state), (ordinary, expected) = found
    assert torch.equal(mine, ordinary)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, msg=name)


def test_a_parameter_that_no_step_can_write_is_refused_and_leaves_no_state():
    p = torch.ones(1).expand(4).requires_grad_()
    optimizer = SGD([p], lr=0.1)
    step_in_backward(optimizer)
    with pytest.raises(ValueError, match="is expanded"):
        backward(p)
    assert not optimizer.state


def test_a_step_inside_a_transform_is_refused_on_the_reference_path_too():
    p = nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=0.5, momentum=0.9, fused=False)
    p.grad = torch.zeros(3)
    optimizer.step()

    def loss(x):
        p.grad = x * 1.0
        optimizer.step()
        return x.sum()

    with pytest.raises(RuntimeError, match=r"^SGD\.step: called inside a transform of torch\.func"):
        torch.func.grad(loss)(torch.ones(3))
    assert float(optimizer.state[p]["step"]) == 1


# --- a step that `optimizer.step()` completes ---


def conditional(in_backward, average, fused, frozen=0):
    """Two parameters; the second has a gradient in steps 0, 3, 4 and 6, or from step `frozen` on."""
    always, sometimes = (nn.Parameter(torch.linspace(0.1, 1.0, 20)) for _ in range(2))
    sometimes.requires_grad_(not frozen)
    optimizer = AdamW([always, sometimes], lr=0.05, average=average, fused=fused, statistics=True)
    handle = step_in_backward(optimizer, once_per_step=True) if in_backward else None
    statistics = []
    for step in range(8):
        if frozen and step == frozen:
            sometimes.requires_grad_(True)
        if handle is not None and step == 5:
            handle.follow()
        if step != 2:  # a step without any gradient
            backward(always, *([sometimes] if (step >= frozen if frozen else step in (0, 3, 4, 6)) else []))
        optimizer.step()
        statistics.append(optimizer.statistics())
        optimizer.zero_grad()
    return [always, sometimes], optimizer, statistics


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("frozen", [0, 3])
@pytest.mark.parametrize("average", [None, EMA(0.5), EMA(0.5, start=3, every=2)], ids=repr)
def test_averages_statistics_and_counts_are_those_of_an_ordinary_step(average, frozen, fused):
    params, optimizer, statistics = conditional(True, average, fused, frozen)
    expected, ordinary, expected_statistics = conditional(False, average, fused, frozen)
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close((p.detach(), optimizer.state[p]), (q.detach(), ordinary.state[q]), rtol=0, atol=0)
    assert (optimizer.num_steps, ordinary.num_steps) == (7, 7)
    assert statistics == expected_statistics


def test_a_second_gradient_begins_another_step_unless_that_is_ruled_out():
    p, q = (torch.ones(2, requires_grad=True) for _ in range(2))
    free, once = SGD([p], lr=0.25), SGD([q], lr=0.25)
    step_in_backward(free)
    step_in_backward(once, once_per_step=True)
    for _ in range(2):
        p.sum().backward()
    free.step()
    assert p.tolist() == [0.5, 0.5] and free.num_steps == 2
    q.sum().backward()
    with pytest.raises(
        RuntimeError, match=r"^step_in_backward\(SGD\): a parameter of shape \[2\] got a second gradient"
    ):
        q.sum().backward()
    assert q.tolist() == [0.75, 0.75]
    q.grad = None
    once.step()
    q.sum().backward()
    assert q.tolist() == [0.5, 0.5]


def test_a_clip_by_tensor_counts_the_steps_that_it_clipped():
    p = torch.ones(2, requires_grad=True)
    optimizer = SGD([p], lr=0.25, clip=ClipPerTensor(1.0))
    step_in_backward(optimizer)
    for factor in (0.1, 10.0, 0.2):
        (p * factor).sum().backward()
        optimizer.step()
    assert (optimizer.num_steps, optimizer.num_clipped) == (3, 1)


def test_removed_and_loaded_the_count_goes_on():
    p = torch.ones(2, requires_grad=True)
    optimizer = AdamW([p], lr=0.25, average=EMA(0.5, start=3))
    handle = step_in_backward(optimizer)
    for _ in range(2):
        p.sum().backward()
        optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    p.sum().backward()
    optimizer.step()
    handle.remove()
    p.sum().backward()
    optimizer.step()
    state = optimizer.state[p]
    assert (float(state["step"]), float(state["num_averaged"]), optimizer.num_steps) == (4, 2, 4)


def test_the_state_lies_together_and_not_between_freed_gradients():
    params = [nn.Parameter(torch.ones(400, 500)) for _ in range(8)]
    optimizer = AdamW(params, average=EMA(0.9))
    step_in_backward(optimizer)
    backward(*params)
    tensors = [optimizer.state[p][name] for p in params for name in ("exp_avg", "exp_avg_sq", "ema")]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
    assert len({t.data_ptr() for t in tensors}) == 24
