# SPDX-License-Identifier: Apache-2.0
"""Tests specific to AdamW; the others are in test_torch_rules.py."""

import pytest
import torch

from lightning_optkit.optimizers import AdamW

SHAPES = [(), (1,), (7,), (16, 33)]  # scalar, one element, odd tail, matrix


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return [[v.clone().requires_grad_() for v in values] for _ in range(2)]


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


def test_a_tensor_lr_is_read_at_every_step(train):
    ours, theirs = parameters(torch.float64)
    lr = torch.tensor(1e-2, dtype=torch.float64)
    optimizers = [AdamW(ours, lr=lr), torch.optim.AdamW(theirs, lr=lr)]
    train(optimizers, [ours, theirs], steps=3)
    lr.mul_(5)
    train(optimizers, [ours, theirs], steps=3, seed=2)
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


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99, 0.999)], ids=str)
def test_refuses_any_other_number_of_betas(betas):
    with pytest.raises((ValueError, IndexError), match="betas"):
        AdamW([torch.ones(2, requires_grad=True)], betas=betas)


def test_a_bad_argument_of_one_group_is_refused_too():
    p, q = (torch.ones(1, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match=r"AdamW\(lr=-1\.0\)"):
        AdamW([dict(params=[p]), dict(params=[q], lr=-1.0)])


def test_decay_is_decoupled_from_the_gradient():
    p = torch.tensor([2.0, -2.0], dtype=torch.float64, requires_grad=True)
    p.grad = torch.zeros_like(p)
    AdamW([p], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(p.detach(), torch.tensor([1.9, -1.9], dtype=torch.float64), rtol=0, atol=1e-15)
