# SPDX-License-Identifier: Apache-2.0
"""Tests specific to Adagrad; the others are in test_torch_rules.py."""

import pytest
import torch

from lightning_optkit.optimizers import Adagrad

SHAPES = [(), (1,), (7,), (16, 33)]  # scalar, one element, odd tail, matrix


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return [[v.clone().requires_grad_() for v in values] for _ in range(2)]


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "int8"], ids=str)
def test_the_sums_go_into_shared_memory_and_training_goes_on(train, state_dtype, steps):
    shared, alone = parameters(torch.float32)
    optimizers = [Adagrad(p, lr=1e-2, initial_accumulator_value=0.5, state_dtype=state_dtype) for p in (shared, alone)]
    train(optimizers, [shared, alone], steps=steps)
    optimizers[0].share_memory()
    sums = [optimizers[0].state[p]["sum"] for p in shared]
    assert all(held.is_shared() for held in sums)
    train(optimizers, [shared, alone], steps=5, seed=2)
    assert all(optimizers[0].state[p]["sum"] is held for p, held in zip(shared, sums, strict=True))
    torch.testing.assert_close(shared, alone, rtol=0, atol=0)
