# SPDX-License-Identifier: Apache-2.0
"""Adafactor with every stage of the step."""

import copy

import pytest
import torch
from torch import nn

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm, ClipPerTensor, ClipUnitwise, ClipValue
from lightning_optkit.optimizers import Adafactor
from lightning_optkit.step.in_backward import step_in_backward
from tests.optimizers.adafactor_cases import parameters, short


def build(params, fused=None, **kwargs):
    return Adafactor(params, lr=0.01, **kwargs)


@pytest.mark.parametrize("kwargs", [dict(), dict(state_dtype="int8"), dict(rounding="stochastic")], ids=short)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_resumes_bit_for_bit(resumes, dtype, kwargs):
    resumes(lambda params: build(params, clip=ClipNorm(1.0), average=EMA(0.9), **kwargs), dtype)


STAGES = {
    "norm": dict(clip=ClipNorm(0.5)),
    "value": dict(clip=ClipValue(0.1)),
    "per tensor": dict(clip=ClipPerTensor(0.5)),
    "per unit": dict(clip=ClipUnitwise(0.01)),
    "l1": dict(l1=0.1),
    "cautious": dict(cautious=True),
    "centralize": dict(centralize=True),
    "stochastic": dict(rounding="stochastic"),
    "kahan": dict(rounding="kahan"),
    "bf16 state": dict(state_dtype=torch.bfloat16),
    "int8 state": dict(state_dtype="int8"),
}


@pytest.mark.parametrize("shape", [(16, 9), (40,)], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_changes_the_step_and_none_by_much(stage, shape, train):
    dtype = torch.bfloat16 if "rounding" in STAGES[stage] else torch.float32
    plain, staged = parameters(
        dtype, 2, [shape, shape]
    )  # two: one factor for all would cancel out in the second moment
    one, other = (Adafactor(p, lr=0.01, weight_decay=0.5, **k) for p, k in ((plain, {}), (staged, STAGES[stage])))
    train([one, other], [plain, staged], steps=9)
    is_kept_as_ever = stage.endswith(" state") and len(shape) > 1  # rows and columns are in fp32
    assert torch.equal(plain[0], staged[0]) == (is_kept_as_ever or (stage == "centralize" and len(shape) == 1))
    torch.testing.assert_close(plain, staged, rtol=0, atol=0.3)


def test_l1_makes_exact_zeros_and_the_average_is_of_the_parameters():
    p = torch.tensor([[0.002, 1.0], [-0.002, 2.0]], requires_grad=True)
    optimizer = Adafactor([p], lr=0.1, l1=0.05, average=EMA(0.5), statistics=True)
    p.grad = torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([[0.0, 0.995], [0.0, 1.995]]))
    first = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["ema"], (first + p.detach()) / 2)
    assert optimizer.statistics()[0].param_norm == pytest.approx(p.norm().item(), rel=1e-6)


def test_the_gradient_is_clipped_before_the_rule_and_not_written():
    (params,) = parameters(torch.float64, 1, [(4, 3)])
    (expected,) = parameters(torch.float64, 1, [(4, 3)])
    one, other = (
        Adafactor(params, eps=(1.0, 1e-3), clip=ClipNorm(0.5)),
        torch.optim.Adafactor(expected, eps=(1.0, 1e-3)),
    )
    for seed in range(5):
        gradient = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        params[0].grad, expected[0].grad = gradient.clone(), gradient.clone()
        nn.utils.clip_grad_norm_(expected, 0.5)
        one.step()
        other.step()
        assert torch.equal(params[0].grad, gradient)
    torch.testing.assert_close(params, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "int8"], ids=str)
def test_state_is_held_in_the_dtype_asked_for_and_changes_dtype_when_loaded(state_dtype, train):
    (params,) = parameters(torch.float32, 1, [(3, 4, 5), (6,)])
    optimizer = Adafactor(params, state_dtype=state_dtype)
    train([optimizer], [params], steps=2)
    held = {"int8": torch.uint8}.get(state_dtype, state_dtype)
    state = optimizer.state[params[0]]
    assert (state["row_var"].shape, state["col_var"].shape) == ((3, 4, 1), (3, 1, 5))
    assert state["row_var"].dtype == state["col_var"].dtype == torch.float32  # few numbers
    assert optimizer.state[params[1]]["variance"].dtype == held
    plain = Adafactor(params)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = Adafactor(copy.deepcopy(params))
    train([expected], [expected.param_groups[0]["params"]], steps=2)
    for name, value in expected.state[expected.param_groups[0]["params"][0]].items():
        assert plain.state[params[0]][name].dtype == torch.float32
        torch.testing.assert_close(plain.state[params[0]][name], value, rtol=0.25, atol=0)  # int8: twice 1/8


def test_steps_inside_the_backward_pass():
    models = [nn.Linear(4, 3).bfloat16() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [Adafactor(model.parameters(), lr=0.1) for model in models]
    handle = step_in_backward(optimizers[1])
    for seed in range(4):
        x = 1e-3 * torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).bfloat16()
        for model, optimizer in zip(models, optimizers, strict=True):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    handle.remove()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_a_transposed_parameter_and_a_sparse_gradient():
    rows = torch.arange(1.0, 13.0).view(3, 4)
    params = [rows.clone().requires_grad_(), rows.t().contiguous().t().requires_grad_(), rows.clone().requires_grad_()]
    optimizer = Adafactor(params, lr=0.1)
    for _ in range(3):
        gradient = torch.zeros(3, 4).index_fill_(0, torch.tensor([1]), 2.0)
        for p in params[:2]:
            p.grad = gradient.clone()
        params[2].grad = gradient.to_sparse()
        optimizer.step()
    torch.testing.assert_close(params[1], params[0])
    torch.testing.assert_close(params[2], params[0])
