# SPDX-License-Identifier: Apache-2.0
"""AdamW against torch.optim.AdamW, over every combination of arguments a user can give."""

import itertools

import pytest
import torch

from lightning_optkit.optimizers import AdamW

SHAPES = [(), (1,), (7,), (16, 33)]  # scalar, one element, odd tail, matrix
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,  # 100 steps on numbers of size 1, each rounded by up to 6e-8, mostly to either side
}
COMBINATIONS = [
    dict(maximize=maximize, amsgrad=amsgrad, weight_decay=weight_decay, eps=eps, betas=betas)
    for maximize, amsgrad, weight_decay, eps, betas in itertools.product(
        (False, True), (False, True), (0.0, 0.1), (1e-30, 1e-8, 1e-2), ((0.9, 0.999), (0.0, 0.5))
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
    train([AdamW(ours, lr=1e-2, **kwargs), torch.optim.AdamW(theirs, lr=1e-2, **kwargs)], [ours, theirs])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("amsgrad", [False, True])
def test_keeps_the_state_that_torch_keeps(train, amsgrad):
    ours, theirs = parameters(torch.float64)
    optimizers = [AdamW(ours, amsgrad=amsgrad), torch.optim.AdamW(theirs, amsgrad=amsgrad)]
    train(optimizers, [ours, theirs], steps=5)
    for p, q in zip(ours, theirs, strict=True):
        state, torch_state = optimizers[0].state[p], optimizers[1].state[q]
        assert state.keys() == torch_state.keys()
        for name, value in torch_state.items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-12, msg=name)


def test_groups_differ_in_every_hyperparameter(train):
    ours, theirs = parameters(torch.float64)

    def groups(params):
        return [
            dict(params=params[:1], lr=1e-3, betas=(0.5, 0.9), eps=1e-4, weight_decay=0.3),
            dict(params=params[1:3], maximize=True, amsgrad=True),
            dict(params=params[3:], lr=torch.tensor(2e-2, dtype=torch.float64), weight_decay=0.0),
        ]

    train([AdamW(groups(ours), lr=1e-2), torch.optim.AdamW(groups(theirs), lr=1e-2)], [ours, theirs])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_tensor_lr_is_read_at_every_step(train):
    ours, theirs = parameters(torch.float64)
    lr = torch.tensor(1e-2, dtype=torch.float64)
    optimizers = [AdamW(ours, lr=lr), torch.optim.AdamW(theirs, lr=lr)]
    train(optimizers, [ours, theirs], steps=3)
    lr.mul_(5)
    train(optimizers, [ours, theirs], steps=3, seed=2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_follows_a_scheduler_of_torch_that_changes_lr_and_beta1(train):
    ours, theirs = parameters(torch.float64)
    optimizers = [AdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)]
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10) for o in optimizers]
    for step in range(10):
        train(optimizers, [ours, theirs], steps=1, seed=step)
        for scheduler in schedulers:
            scheduler.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_amsgrad_switched_on_in_mid_training_takes_effect_at_the_next_step():
    # torch keeps no maximum yet and raises a KeyError; ours starts it at this step's second moment.
    p = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = AdamW([p], weight_decay=0.0)
    for grad in (4.0, 0.0, 0.0):
        p.grad = torch.full_like(p, grad)
        optimizer.step()
        optimizer.param_groups[0]["amsgrad"] = True
    largest = optimizer.state[p]["max_exp_avg_sq"]
    assert (largest > optimizer.state[p]["exp_avg_sq"]).all()


BAD_ARGUMENTS = [
    dict(lr=-1.0),
    dict(lr=float("nan")),
    dict(lr="0.1"),
    dict(lr=None),
    dict(lr=torch.ones(2)),
    dict(betas=(-0.1, 0.9)),
    dict(betas=(1.0, 0.9)),
    dict(betas=(0.9, 1.0)),
    dict(betas=(0.9, float("nan"))),
    dict(betas=0.9),
    dict(eps=-1e-8),
    dict(eps="0"),
    dict(weight_decay=-0.1),
    dict(weight_decay="0.1"),
    dict(fused=True, foreach=True),
]


@pytest.mark.parametrize("kwargs", BAD_ARGUMENTS, ids=short)
def test_a_bad_argument_raises_what_torch_raises(kwargs):
    with pytest.raises(Exception) as theirs:
        torch.optim.AdamW([torch.ones(2, requires_grad=True)], **kwargs)
    with pytest.raises(theirs.type):
        AdamW([torch.ones(2, requires_grad=True)], **kwargs)


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99, 0.999)], ids=str)
def test_refuses_any_other_number_of_betas(betas):
    with pytest.raises((ValueError, IndexError), match="betas"):
        AdamW([torch.ones(2, requires_grad=True)], betas=betas)


def test_its_messages_name_the_argument_the_value_and_the_range():
    with pytest.raises(ValueError, match=r"^AdamW\(betas\[1\]=1\.0\): betas\[1\] must be in \[0, 1\)\.$"):
        AdamW([torch.ones(1, requires_grad=True)], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"^AdamW\(eps=-1\): eps must be in \[0, inf\)\.$"):
        AdamW([torch.ones(1, requires_grad=True)], eps=-1)


def test_a_bad_argument_of_one_group_is_refused_too():
    p, q = (torch.ones(1, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match=r"AdamW\(lr=-1\.0\)"):
        AdamW([dict(params=[p]), dict(params=[q], lr=-1.0)])


def test_decay_is_decoupled_from_the_gradient():
    p = torch.tensor([2.0, -2.0], dtype=torch.float64, requires_grad=True)
    p.grad = torch.zeros_like(p)
    AdamW([p], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(p.detach(), torch.tensor([1.9, -1.9], dtype=torch.float64), rtol=0, atol=1e-15)
