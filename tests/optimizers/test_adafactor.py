# SPDX-License-Identifier: Apache-2.0
"""Adafactor against torch.optim.Adafactor, over every combination of arguments a user can give, and on real data."""

import itertools

import pytest
import torch
from torch import nn

from lightning_optkit._native import extension
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import Adafactor
from tests.optimizers.adafactor_cases import TOLERANCE, assert_state_close, needs_extension, parameters, short

COMBINATIONS = [
    dict(zip(("maximize", "beta2_decay", "eps", "d", "weight_decay"), values, strict=True)) | dict(foreach=foreach)
    for values, foreach in zip(
        itertools.product((False, True), (-0.8, 0.0), ((None, 1e-3), (0.5, 0.1)), (1.0, 1.5), (0.0, 0.1)),
        itertools.cycle((None, True, False)),
        strict=False,
    )
]
RATES = [0.0, 1e-3, 3.0, "tensor"]  # no step, below 1 / sqrt(t) throughout, above it


# --- torch's numbers ---


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kwargs", COMBINATIONS, ids=short)
def test_follows_torch_over_50_steps(train, kwargs, dtype):
    ours, theirs = parameters(dtype)
    one, other = Adafactor(ours, **kwargs), torch.optim.Adafactor(theirs, **kwargs)
    train([one, other], [ours, theirs], steps=50)
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert_state_close(one, ours, other, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lr", RATES)
def test_follows_torch_at_every_rate(train, lr, dtype):
    ours, theirs = parameters(dtype)
    rates = [torch.tensor(0.02, dtype=dtype) if lr == "tensor" else lr for _ in range(2)]
    one = Adafactor(ours, lr=rates[0], weight_decay=0.01)
    other = torch.optim.Adafactor(theirs, lr=rates[1], weight_decay=0.01)
    train([one, other], [ours, theirs], steps=50)
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_small_gradients_of_16_bit_parameters_are_divided_by_the_eps_of_their_dtype():
    """torch's eps[0] of None is 2**-7 in bf16, and much smaller in the fp32 that the step computes in."""
    ours, theirs = (p for (p,) in parameters(torch.bfloat16, 2, [(16, 33)]))
    one, other = Adafactor([ours], lr=0.1), torch.optim.Adafactor([theirs], lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        ours.grad = (1e-3 * torch.randn(16, 33, generator=generator)).bfloat16()
        theirs.grad = ours.grad.clone()
        before = ours.detach().clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * 2**-8)  # a rounding of numbers up to 2, now and then
    assert 0 < (ours - before).abs().max() < 0.05  # of 0.1, had the eps not bounded it


def test_each_dtype_of_a_group_has_its_own_eps():
    """torch uses that of the first parameter for all, so its results depend on the order of parameters."""

    def change(optimizer_class, dtypes):
        params = {dtype: torch.ones(4, 3, dtype=dtype, requires_grad=True) for dtype in dtypes}
        optimizer = optimizer_class(params.values(), lr=0.1)
        for p in params.values():
            p.grad = torch.full_like(p, 1e-3)
        optimizer.step()
        return (1 - params[torch.float32].detach()).max().item()

    order = [torch.bfloat16, torch.float32]
    assert change(torch.optim.Adafactor, order) < 0.02
    assert change(torch.optim.Adafactor, order[::-1]) == pytest.approx(0.1)
    assert change(Adafactor, order) == change(Adafactor, order[::-1]) == pytest.approx(0.1)


def test_a_parameter_of_no_elements_stays_where_torch_divides_by_zero():
    def empty():
        p = torch.ones(3, 0, requires_grad=True)
        p.grad = torch.ones(3, 0)
        return [p]

    with pytest.raises(ZeroDivisionError):
        torch.optim.Adafactor(empty()).step()
    params = empty()
    optimizer = Adafactor(params)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1
    assert optimizer.explain().groups[0].bytes_moved == 2 * 4 * 3


# --- what it says ---


@needs_extension
def test_says_which_path_it_takes_and_what_it_moves():
    model = nn.Linear(100, 50)
    matrix, vector = (
        Adafactor([p], weight_decay=0.1, clip=ClipNorm(1.0)).explain().groups[0] for p in model.parameters()
    )
    assert (matrix.rule, matrix.stages[-2:]) == ("adafactor", ("update", "decay(0.1)"))
    assert matrix.path == vector.path == f"compiled ({extension.cpu_isa()})"
    # g for the clip's norm, the factors, the update's norm and the update; p for its norm, read and written
    assert matrix.bytes_moved == 4 * (7 * 5000 + 2 * (100 + 50))
    assert vector.bytes_moved == 4 * (7 * 50 + 2 * 50)
    assert (matrix.state_dtype, vector.state_dtype) == ("float32", "float32")


@needs_extension
@pytest.mark.parametrize(
    ("param", "state_dtype", "reason"),
    [
        (torch.ones(3, 4).t(), torch.float32, "its rows do not lie one behind another in memory"),
        (torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.float32, "its rows do not lie"),
        (torch.ones(3, 4), "int8", None),
        (torch.ones(3, 4, dtype=torch.float64), "int8", None),
        (torch.ones(3, 4)[:, :1], torch.float32, "its memory has gaps"),
        (torch.ones(5), "int8", None),
        (torch.ones(3, 4), torch.bfloat16, None),
    ],
)
def test_says_what_the_compiled_path_does_not_cover(param, state_dtype, reason):
    param = param.detach().requires_grad_()
    optimizer = Adafactor([param], state_dtype=state_dtype)
    (plan,) = optimizer.explain().groups
    assert plan.path.startswith(f"reference: {reason}" if reason else "compiled")
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert (param < 1).all()


def test_keeps_numbers_per_row_and_column_only():
    (params,) = parameters(torch.float32, 1, [(200, 300)])
    optimizer = Adafactor(params)
    params[0].grad = torch.ones(200, 300)
    optimizer.step()
    assert sum(t.numel() for t in optimizer.state[params[0]].values()) == 200 + 300 + 1


def test_learns_the_digits(digits_loss):
    def model():
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    assert digits_loss(lambda params: Adafactor(params, lr=0.05), steps=200, model=model) < 0.1


# --- weights of any scale ---


@pytest.mark.parametrize("fused", [None, pytest.param(False, id="reference")])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
@pytest.mark.parametrize("shape", [(40, 50), (300,)], ids=str)
def test_the_step_is_in_proportion_to_weights_of_any_scale(shape, scale, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(shape) * scale, torch.randn(5, *shape)
    results = []
    for dtype in (torch.float32, torch.float64):
        p = values.to(dtype, copy=True).requires_grad_()
        optimizer = Adafactor([p], lr=0.1, eps=(1e-7, 0.0), weight_decay=0.0)
        for group in optimizer.param_groups:
            group["fused"] = fused
        for grad in gradients:
            p.grad = grad.to(dtype)
            optimizer.step()
        results.append(p.detach().double() / scale)
    assert not torch.allclose(results[1], values.double() / scale, rtol=0.01)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
