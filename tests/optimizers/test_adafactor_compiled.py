# SPDX-License-Identifier: Apache-2.0
"""The compiled step of Adafactor is that in plain PyTorch."""

import copy

import pytest
import torch

from lightning_optkit._native import extension
from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm, ClipPerTensor, ClipUnitwise, ClipValue
from lightning_optkit.optimizers import Adafactor
from tests.optimizers.adafactor_cases import needs_extension, parameters

# Rows shorter and longer than a vector, matrices of several strips and chunks, several matrices, and columns in blocks.
COMPILED_SHAPES = [(9,), (20_000,), (3, 5), (2, 400, 330), (64, 8, 3, 3), (5, 5000), (3000, 7)]
STEP_TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def step_both_paths(dtype, shapes, steps, **kwargs):
    """A compiled optimizer and one in plain PyTorch, with their parameters, after the same steps."""
    lists = parameters(dtype, 2, shapes)
    optimizers = [Adafactor(params, lr=0.05, **copy.deepcopy(kwargs)) for params in lists]
    optimizers[1].param_groups[0]["fused"] = False
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        for p, q in zip(*lists, strict=True):
            p.grad = (torch.randn(p.shape, generator=generator, dtype=torch.float64) + 0.3).to(dtype)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    return optimizers, lists


EVERYTHING = dict(
    maximize=True, clip=ClipUnitwise(0.05), average=EMA(0.9), l1=0.01, cautious=True, centralize=True, weight_decay=0.1,
    statistics=True,
)  # fmt: skip
COMPILED_STAGES = {
    "plain": dict(),
    "arguments": dict(beta2_decay=-0.3, eps=(0.5, 2.0), d=1.5, weight_decay=0.1, maximize=True),
    "no bounds": dict(eps=(0.0, 0.0), d=float("inf")),
    "norm": dict(clip=ClipNorm(0.5), average=EMA(0.9)),
    "value": dict(clip=ClipValue(0.5), l1=0.01),
    "per tensor": dict(clip=ClipPerTensor(0.5)),
    "bf16 state": dict(state_dtype=torch.bfloat16),
    "kahan": dict(rounding="kahan"),
    "stochastic": dict(rounding="stochastic"),
    "everything": EVERYTHING,
}


@needs_extension
@pytest.mark.parametrize("dtype", STEP_TOLERANCE, ids=str)
@pytest.mark.parametrize("stage", COMPILED_STAGES)
def test_the_compiled_step_is_the_step_in_plain_pytorch(stage, dtype):
    (one, other), (ours, expected) = step_both_paths(dtype, COMPILED_SHAPES, 2, **COMPILED_STAGES[stage])
    paths = [{plan.path for plan in optimizer.explain().groups} for optimizer in (one, other)]
    assert paths == [{f"compiled ({extension.cpu_isa()})"}, {"reference: fused=False"}]
    # A mean square that is rounded the other way to bf16 moves the step of its row by 2**-9.
    least = 2**-9 * 0.05 * 4 if stage == "bf16 state" and dtype != torch.float64 else 0.0
    for p, q in zip(ours, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=2 * STEP_TOLERANCE[dtype], atol=max(least, STEP_TOLERANCE[dtype]))
        assert one.state[p].keys() == other.state[q].keys()
        for name, value in other.state[q].items():
            if name != "compensation":  # what is left depends on the last bit
                tolerance = max(STEP_TOLERANCE[dtype], 2**-7 if value.dtype == torch.bfloat16 else 0)
                torch.testing.assert_close(one.state[p][name], value, rtol=2 * tolerance, atol=tolerance, msg=name)
    if stage == "everything":
        assert one.num_clipped == other.num_clipped > 0
        for counted, q in zip(one.statistics(), other.statistics(), strict=True):
            assert counted.update_norm == pytest.approx(q.update_norm, rel=2e-2 if dtype.itemsize == 2 else 1e-5)


@needs_extension
@pytest.mark.parametrize("shape", [(3000, 40), (40, 3000), (300, 300), (30_000,)], ids=str)
def test_is_no_further_from_fp64_than_torch_after_50_steps(shape):
    def trained(optimizer_class, dtype):
        generator = torch.Generator().manual_seed(0)
        (p,) = params = [torch.randn(shape, generator=generator).to(dtype).requires_grad_()]
        # eps[0] by hand: that of the dtype would differ.
        optimizer = optimizer_class(params, lr=0.05, eps=(1e-7, 1e-3), weight_decay=0.1)
        for _ in range(50):
            p.grad = (torch.randn(shape, generator=generator) + 0.3).to(dtype)
            optimizer.step()
        return p.detach().double()

    exact = trained(torch.optim.Adafactor, torch.float64)
    error, theirs = ((trained(c, torch.float32) - exact).norm() for c in (Adafactor, torch.optim.Adafactor))
    assert 0 < error < 1.2 * theirs


@needs_extension
@pytest.mark.parametrize("kwargs", [dict(), EVERYTHING], ids=["plain", "everything"])
def test_the_bits_do_not_depend_on_the_number_of_threads(kwargs, threads, snapshot):
    taken = []
    for count in (1, 2, 3):
        threads(count)
        (optimizer, _), _ = step_both_paths(torch.float32, COMPILED_SHAPES, 2, **kwargs)
        taken.append(snapshot(optimizer))
    assert taken[0] == taken[1] == taken[2]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_does_what_it_does_in_torch(bad):
    ours, theirs = parameters(torch.float32, 2, [(20, 30), (30,)])
    optimizers = [Adafactor(ours), torch.optim.Adafactor(theirs)]
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.ones_like(p)
        p.grad.view(-1)[7] = bad
        q.grad = p.grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert any(not p.isfinite().all() for p in ours)


@needs_extension
def test_a_parameter_without_a_gradient_stands_still_beside_others():
    (params,) = parameters(torch.float32, 1, [(30, 40), (50, 60), (3,)])
    (alone,) = parameters(torch.float32, 1, [(30, 40), (50, 60), (3,)])
    one, other = Adafactor(params), [Adafactor([p]) for p in alone]
    for step in range(4):
        for k, (p, q) in enumerate(zip(params, alone, strict=True)):
            is_idle = step == 2 and k == 0
            p.grad = None if is_idle else torch.full_like(p, 1.0 + step)
            if not is_idle:
                q.grad = p.grad.clone()
                other[k].step()
        one.step()
    assert all(map(torch.equal, params, alone))
