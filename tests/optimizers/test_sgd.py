# SPDX-License-Identifier: Apache-2.0
"""SGD against torch.optim.SGD, over every combination of arguments a user can give."""

import itertools

import pytest
import torch

from lightning_optkit.optimizers import SGD

SHAPES = [(), (1,), (7,), (16, 33)]  # scalar, one element, odd tail, matrix
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,  # 100 steps on numbers below 4; momentum 0.9 repeats each rounding of 6e-8 ten times
}
COMBINATIONS = [
    dict(momentum=momentum, dampening=dampening, nesterov=nesterov, weight_decay=weight_decay, maximize=maximize)
    for momentum, dampening, nesterov, weight_decay, maximize in itertools.product(
        (0.0, 0.5, 0.9), (0.0, 0.3, 1.0), (False, True), (0.0, 0.1), (False, True)
    )
    if not nesterov or (momentum > 0 and dampening == 0)
]


def short(kwargs):
    return "-".join(f"{name}={value}" for name, value in kwargs.items())


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return [[v.clone().requires_grad_() for v in values] for _ in range(2)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kwargs", COMBINATIONS, ids=short)
def test_follows_torch_over_100_steps(train, kwargs, dtype):
    ours, theirs = parameters(dtype)
    train([SGD(ours, lr=1e-2, **kwargs), torch.optim.SGD(theirs, lr=1e-2, **kwargs)], [ours, theirs])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype])


def test_groups_differ_in_every_hyperparameter(train):
    ours, theirs = parameters(torch.float64)

    def groups(params):
        return [
            dict(params=params[:1], momentum=0.9, nesterov=True, dampening=0.0, weight_decay=0.1),
            dict(params=params[1:3], momentum=0.0, maximize=True),
            dict(params=params[3:], lr=torch.tensor(2e-2, dtype=torch.float64), momentum=0.5, dampening=0.2),
        ]

    train([SGD(groups(ours), lr=1e-2), torch.optim.SGD(groups(theirs), lr=1e-2)], [ours, theirs])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_keeps_a_buffer_only_with_momentum(train):
    plain, heavy = parameters(torch.float32)
    optimizers = [SGD(plain), SGD(heavy, momentum=0.9)]
    train(optimizers, [plain, heavy], steps=2)
    assert all("momentum_buffer" not in optimizers[0].state[p] for p in plain)
    assert all("momentum_buffer" in optimizers[1].state[p] for p in heavy)


def test_the_buffer_starts_as_the_first_gradient_undamped():
    p = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    p.grad = torch.tensor([1.0, -2.0], dtype=torch.float64)
    optimizer = SGD([p], lr=0.5, momentum=0.9, dampening=0.7)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], p.grad)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("momenta", [(0.0, 0.0, 0.9, 0.9), (0.9, 0.9, 0.0, 0.9, 0.5)], ids=str)
def test_momentum_may_be_switched_on_and_off_in_mid_training(train, momenta, dampening, fused):
    ours, theirs = parameters(torch.float64)
    optimizers = [SGD(ours, fused=fused, dampening=dampening), torch.optim.SGD(theirs, dampening=dampening)]
    for step, momentum in enumerate(momenta):
        for optimizer in optimizers:
            optimizer.param_groups[0]["momentum"] = momentum
        train(optimizers, [ours, theirs], steps=1, seed=step)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_follows_a_scheduler_of_torch_that_changes_lr_and_momentum(train):
    ours, theirs = parameters(torch.float64)
    optimizers = [SGD(ours, momentum=0.9), torch.optim.SGD(theirs, momentum=0.9)]
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10) for o in optimizers]
    for step in range(10):
        train(optimizers, [ours, theirs], steps=1, seed=step)
        for scheduler in schedulers:
            scheduler.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


BAD_ARGUMENTS = [
    dict(lr=-1.0),
    dict(lr="0.1"),
    dict(lr=torch.ones(2)),
    dict(momentum=-0.1),
    dict(weight_decay=-0.1),
    dict(nesterov=True),
    dict(nesterov=True, momentum=0.9, dampening=0.1),
    dict(fused=True, foreach=True),
]


@pytest.mark.parametrize("kwargs", BAD_ARGUMENTS, ids=short)
def test_a_bad_argument_raises_what_torch_raises(kwargs):
    with pytest.raises(Exception) as theirs:
        torch.optim.SGD([torch.ones(2, requires_grad=True)], **kwargs)
    with pytest.raises(theirs.type):
        SGD([torch.ones(2, requires_grad=True)], **kwargs)


def test_its_messages_name_the_argument_the_value_and_the_range():
    with pytest.raises(ValueError, match=r"^SGD\(momentum=-0\.1\): momentum must be in \[0, inf\)\.$"):
        SGD([torch.ones(1, requires_grad=True)], momentum=-0.1)
    with pytest.raises(ValueError, match=r"^SGD\(nesterov=True\): needs momentum > 0 and dampening = 0\.$"):
        SGD([torch.ones(1, requires_grad=True)], nesterov=True)


def test_refuses_a_learning_rate_that_is_not_a_number():
    with pytest.raises(ValueError, match=r"SGD\(lr=nan\)"):
        SGD([torch.ones(1, requires_grad=True)], lr=float("nan"))
