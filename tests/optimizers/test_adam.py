# SPDX-License-Identifier: Apache-2.0
"""Tests specific to Adam; the others are in test_torch_rules.py."""

import torch

from lightning_optkit.optimizers import Adam, AdamW

SHAPES = [(), (1,), (7,), (16, 33)]  # scalar, one element, odd tail, matrix


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return [[v.clone().requires_grad_() for v in values] for _ in range(2)]


def test_zero_epsilon_gives_a_zero_gradient_the_nan_of_torch():
    ours, theirs = parameters(torch.float64)
    optimizers = [Adam(ours, eps=0.0), torch.optim.Adam(theirs, eps=0.0)]
    for p in ours + theirs:
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.isnan(p).all() for p in ours)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


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
