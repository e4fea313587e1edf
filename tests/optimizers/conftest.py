# SPDX-License-Identifier: Apache-2.0
"""The contract of every rule."""

import copy
import io

import pytest
import torch
from sklearn.datasets import load_digits

from lightning_optkit._native import extension
from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm

SHAPES = [(), (0,), (1,), (7,), (16, 33), (3, 5, 4), (70, 301)]


def _parameters(dtype, count=1, shapes=SHAPES):
    """`count` equal lists of parameters."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [[value.to(dtype).clone().requires_grad_() for value in values] for _ in range(count)]


def _steps(optimizer, params, gradients):
    for gradient in gradients:
        for p, g in zip(params, gradient, strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()


def _gradients(params, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(p.shape, generator=generator, dtype=torch.float64) + 0.3 for p in params] for _ in range(steps)
    ]


@pytest.fixture
def paths_agree():
    """paths_agree(build, dtype, **tolerance): the compiled walk and plain PyTorch, with a clip and an average."""

    def check(build, dtype, averages=True, **tolerance):
        compiled, reference = _parameters(dtype, 2)
        average = EMA(0.9) if averages else None
        one = build(compiled, clip=ClipNorm(1.0), average=average, fused=None)
        other = build(reference, clip=ClipNorm(1.0), average=average, fused=False)
        gradients = _gradients(compiled, 50)
        _steps(one, compiled, gradients)
        _steps(other, reference, gradients)
        assert one.num_clipped == other.num_clipped == 50
        paths = [
            [plan.path for plan in each.explain().groups if plan.rule not in ("came", "dadapt_adam", "muon", "soap")]
            for each in (one, other)
        ]
        assert extension is None or {path.split(" (")[0] for path in paths[0]} <= {"compiled"}
        assert {*paths[1]} <= {"reference: fused=False"}
        for p, q in zip(compiled, reference, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), **tolerance)
            if averages:
                torch.testing.assert_close(one.state[p]["ema"], other.state[q]["ema"], **tolerance)

    return check


@pytest.fixture
def resumes(frozen):
    """resumes(build, dtype): a saved and loaded run continues bitwise like an uninterrupted one."""

    def check(build, dtype):
        straight, stopped = _parameters(dtype, 2)
        gradients = _gradients(straight, 20)
        optimizer = build(straight)
        _steps(optimizer, straight, gradients)
        first = build(stopped)
        _steps(first, stopped, gradients[:9])
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        resumed = [p.detach().clone().requires_grad_() for p in stopped]
        second = build(resumed)
        second.load_state_dict(torch.load(file, weights_only=True))
        twin, copied = copy.deepcopy((second, resumed))
        _steps(second, resumed, gradients[9:])
        assert frozen(resumed) == frozen(straight)
        assert frozen(second.state_dict()["state"]) == frozen(optimizer.state_dict()["state"])
        _steps(twin, copied, gradients[9:])
        assert frozen(copied) == frozen(straight)

    return check


@pytest.fixture
def digits_loss():
    """digits_loss(build, steps): the loss of a linear model on scikit-learn's digits after so many full batches."""

    def train(build, steps=200, evaluate=None, model=None):
        digits = load_digits()
        x = torch.tensor(digits.data / 16, dtype=torch.float32)
        y = torch.tensor(digits.target)
        torch.manual_seed(0)
        model = model() if model else torch.nn.Linear(64, 10)
        optimizer = build(model.parameters())
        for _ in range(steps):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        if evaluate:
            evaluate(optimizer)
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(model(x), y).item()

    return train
