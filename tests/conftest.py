# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: equal training of two optimizers, and snapshots for bitwise comparison."""

import gc
import os
import random
import zlib

import numpy as np
import pytest
import torch
from hypothesis import settings

# The same examples in every run, so that failures are reproducible. `make test-slow` draws others, and more of them.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.register_profile("random", max_examples=500, database=None, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_modifyitems(items):
    """Processes that collect other names refuse to share the tests, and only sometimes do addresses differ."""
    named_by_address = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if named_by_address:
        raise pytest.UsageError(f"tests named by an address in memory: {named_by_address}")


def pytest_collection_finish():
    """20,000 collected tests are millions of objects, which every full collection of garbage would visit: 2 s each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded(request):
    """Numbers that depend on the test alone, not on which tests its process ran before."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    # torch.manual_seed formats a stack for every kind of device that is not there: 0.3 ms before each of 26,000 tests.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


@pytest.fixture(autouse=True)
def _errors_of_a_watch(request, monkeypatch):
    """What watches a run passes over errors of its own, and would pass over a mistake that a test is there to find."""

    def take(guard, part, error):
        if not guard.is_muted:
            raise error

    if "errors_are_warnings" not in request.fixturenames:
        monkeypatch.setattr("lightning_optkit.diagnostics._guard.Guard.take", take)


@pytest.fixture
def errors_are_warnings():
    """As for a user."""


def _frozen(value):
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided:
            value = value.to_dense()
        numbers = value.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        return str(value.dtype), tuple(value.shape), numbers.view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_frozen(item) for item in value]
    return value


def _snapshot(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "params": _frozen(params),
        "grads": _frozen([p.grad for p in params]),
        "state_dict": _frozen(optimizer.state_dict()),
        "num_steps": getattr(optimizer, "num_steps", None),
        "num_clipped": getattr(optimizer, "num_clipped", None),
    }


def _train(optimizers, parameter_lists, steps=100, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for index, params in enumerate(zip(*parameter_lists, strict=True)):
            grad = torch.randn(params[0].shape, generator=generator, dtype=torch.float64) + 0.3
            if step >= 2:
                grad = grad * (torch.rand(grad.shape, generator=generator) < 0.9)
            for p in params:
                p.grad = (grad * (1 + index)).to(p.dtype)
        for optimizer in optimizers:
            optimizer.step()


@pytest.fixture(scope="session")
def train():
    """train(optimizers, parameter_lists, steps, seed): the same gradients for all: noise, a drift and exact zeros."""
    return _train


@pytest.fixture
def snapshot():
    """snapshot(optimizer): parameters, gradients, state, groups and counters, in plain Python, NaN included."""
    return _snapshot


@pytest.fixture
def frozen():
    """frozen(tensors): the bits of a tensor, or of a list or dict of them."""
    return _frozen


@pytest.fixture
def threads():
    """threads(count) sets the number of threads, and restores it after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
