# SPDX-License-Identifier: Apache-2.0
"""Adam against torch.optim.Adam, over every combination of arguments a user can give."""

import itertools

import pytest
import torch

from lightning_optkit.optimizers import Adam, AdamW

SHAPES = [(), (1,), (7,), (16, 33)]  # scalar, one element, odd tail, matrix
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,  # 100 steps on numbers of size 1, each rounded by up to 6e-8, mostly to either side
}
COMBINATIONS = [
    dict(maximize=maximize, amsgrad=amsgrad, weight_decay=weight_decay, eps=eps, decoupled_weight_decay=decoupled)
    for maximize, amsgrad, weight_decay, eps, decoupled in itertools.product(
        (False, True), (False, True), (0.0, 0.1), (1e-30, 1e-8, 1e-2), (False, True)
    )
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
    train([Adam(ours, lr=1e-2, **kwargs), torch.optim.Adam(theirs, lr=1e-2, **kwargs)], [ours, theirs])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype])


def test_zero_epsilon_gives_a_zero_gradient_the_nan_of_torch():
    ours, theirs = parameters(torch.float64)
    optimizers = [Adam(ours, eps=0.0), torch.optim.Adam(theirs, eps=0.0)]
    for p in ours + theirs:
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.isnan(p).all() for p in ours)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_groups_differ_in_every_hyperparameter(train):
    ours, theirs = parameters(torch.float64)

    def groups(params):
        return [
            dict(params=params[:1], lr=1e-3, betas=(0.5, 0.9), eps=1e-4, weight_decay=0.3),
            dict(params=params[1:3], maximize=True, amsgrad=True, decoupled_weight_decay=True, weight_decay=0.1),
            dict(params=params[3:], lr=torch.tensor(2e-2, dtype=torch.float64), betas=(0.0, 0.0)),
        ]

    train([Adam(groups(ours), lr=1e-2), torch.optim.Adam(groups(theirs), lr=1e-2)], [ours, theirs])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_decoupled_decay_makes_it_adamw(train, frozen):
    adam, adamw = parameters(torch.float32)
    optimizers = [Adam(adam, decoupled_weight_decay=True, weight_decay=0.1), AdamW(adamw, weight_decay=0.1)]
    train(optimizers, [adam, adamw], steps=5)
    assert frozen(adam) == frozen(adamw)


def test_the_first_step_has_length_lr_whatever_the_gradient():
    p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    p.grad = torch.tensor([1e-3, -1.0, 1e5], dtype=torch.float64)
    Adam([p], lr=0.25, eps=0.0).step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.25, 0.25, -0.25], dtype=torch.float64), rtol=0, atol=1e-14)


BAD_ARGUMENTS = [
    dict(lr=-1.0),
    dict(lr=float("nan")),
    dict(lr="0.1"),
    dict(lr=torch.ones(2)),
    dict(betas=(-0.1, 0.9)),
    dict(betas=(1.0, 0.9)),
    dict(betas=(0.9, 1.0)),
    dict(eps=-1e-8),
    dict(weight_decay=-0.1),
    dict(fused=True, foreach=True),
]


@pytest.mark.parametrize("kwargs", BAD_ARGUMENTS, ids=short)
def test_a_bad_argument_raises_what_torch_raises(kwargs):
    with pytest.raises(Exception) as theirs:
        torch.optim.Adam([torch.ones(2, requires_grad=True)], **kwargs)
    with pytest.raises(theirs.type):
        Adam([torch.ones(2, requires_grad=True)], **kwargs)


def test_its_messages_name_the_argument_the_value_and_the_range():
    with pytest.raises(ValueError, match=r"^Adam\(lr=-1\.0\): lr must be in \[0, inf\)\.$"):
        Adam([torch.ones(1, requires_grad=True)], lr=-1.0)
