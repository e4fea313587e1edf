# SPDX-License-Identifier: Apache-2.0
"""Tests specific to SGD; the others are in test_torch_rules.py."""

import pytest
import torch

from lightning_optkit.optimizers import SGD

SHAPES = [(), (1,), (7,), (16, 33)]  # scalar, one element, odd tail, matrix


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return [[v.clone().requires_grad_() for v in values] for _ in range(2)]


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
