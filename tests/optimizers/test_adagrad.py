# SPDX-License-Identifier: Apache-2.0
"""Adagrad against torch.optim.Adagrad, over every combination of arguments a user can give."""

import copy
import itertools

import pytest
import torch

from lightning_optkit.optimizers import Adagrad

SHAPES = [(), (1,), (7,), (16, 33)]  # scalar, one element, odd tail, matrix
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 4e-6,  # 50 steps on numbers of size 1, each rounded by up to 6e-8, mostly to either side
}
COMBINATIONS = [
    dict(zip(("maximize", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"), values, strict=True))
    for values in itertools.product((False, True), (0.0, 0.1), (0.0, 0.1), (0.0, 0.5), (1e-10, 1e-2))
]


def short(kwargs):
    return "-".join(f"{name}={value}" for name, value in kwargs.items())


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return [[v.clone().requires_grad_() for v in values] for _ in range(2)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kwargs", COMBINATIONS, ids=short)
def test_follows_torch_over_50_steps(train, kwargs, dtype):
    ours, theirs = parameters(dtype)
    train([Adagrad(ours, lr=1e-2, **kwargs), torch.optim.Adagrad(theirs, lr=1e-2, **kwargs)], [ours, theirs], steps=50)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("kwargs", COMBINATIONS, ids=short)
def test_the_compiled_step_is_the_reference_step(train, kwargs):
    compiled, reference = parameters(torch.float32)
    optimizers = [Adagrad(compiled, lr=1e-2, **kwargs), Adagrad(reference, lr=1e-2, fused=False, **kwargs)]
    train(optimizers, [compiled, reference], steps=10)
    torch.testing.assert_close(compiled, reference, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kwargs", COMBINATIONS[-2:], ids=short)
@pytest.mark.parametrize("to_torch", [False, True])
def test_a_state_dict_continues_in_the_other_package(train, kwargs, to_torch):
    ours, theirs = parameters(torch.float64)
    optimizers = [Adagrad(ours, lr=1e-2, **kwargs), torch.optim.Adagrad(theirs, lr=1e-2, **kwargs)]
    train(optimizers, [ours, theirs], steps=5)
    source, target = optimizers if to_torch else optimizers[::-1]
    target.load_state_dict(copy.deepcopy(source.state_dict()))  # torch would go on with the very same tensors
    train(optimizers, [ours, theirs], steps=5, seed=2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


BAD_ARGUMENTS = [
    dict(lr=-1.0),
    dict(weight_decay=-0.1),
    dict(lr_decay=-1.0),
    dict(initial_accumulator_value=-1.0),
    dict(eps=-1.0),
]


@pytest.mark.parametrize("kwargs", BAD_ARGUMENTS, ids=short)
def test_a_bad_argument_raises_what_torch_raises(kwargs):
    with pytest.raises(Exception) as theirs:
        torch.optim.Adagrad([torch.ones(2, requires_grad=True)], **kwargs)
    with pytest.raises(theirs.type):
        Adagrad([torch.ones(2, requires_grad=True)], **kwargs)


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
