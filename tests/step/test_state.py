# SPDX-License-Identifier: Apache-2.0
"""The tensors in the optimizer's state, with torch's names, and their dtypes."""

import pytest
import torch

from lightning_optkit.averaging import EMA
from lightning_optkit.optimizers import SGD, Adafactor, Adam, AdamW

FLOAT, BFLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64


def state_after_a_step(optimizer_class, dtype=torch.float32, shape=(3, 4), **kwargs):
    p = torch.ones(shape, dtype=dtype, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = optimizer_class([p], **kwargs)
    optimizer.step()
    return optimizer.state[p]


@pytest.mark.parametrize(
    ("optimizer_class", "kwargs", "names"),
    [
        (SGD, dict(), ["step"]),
        (SGD, dict(momentum=0.9), ["momentum_buffer", "momentum_step", "step"]),
        (Adam, dict(), ["step", "exp_avg", "exp_avg_sq"]),
        (AdamW, dict(amsgrad=True), ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
        (SGD, dict(average=EMA()), ["step", "ema", "num_averaged"]),
        (SGD, dict(rounding="kahan"), ["step", "compensation"]),
    ],
    ids=str,
)
def test_holds_what_the_rule_and_the_stages_need_and_no_more(optimizer_class, kwargs, names):
    assert set(state_after_a_step(optimizer_class, **kwargs)) == set(names)


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize(
    ("dtype", "state_dtype", "moments", "average"),
    [
        (FLOAT, FLOAT, FLOAT, FLOAT),
        (FLOAT, BFLOAT, BFLOAT, FLOAT),
        (BFLOAT, FLOAT, FLOAT, FLOAT),
        (BFLOAT, BFLOAT, BFLOAT, FLOAT),
        (HALF, FLOAT, FLOAT, FLOAT),
        (DOUBLE, FLOAT, DOUBLE, DOUBLE),
        (DOUBLE, BFLOAT, DOUBLE, DOUBLE),
    ],
    ids=str,
)
def test_dtypes_follow_state_dtype_and_the_average_is_at_least_fp32(dtype, state_dtype, moments, average, fused):
    state = state_after_a_step(
        AdamW, dtype, state_dtype=state_dtype, average=EMA(), rounding="kahan", amsgrad=True, fused=fused
    )
    assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")} == {moments}
    assert state["ema"].dtype == average
    assert state["compensation"].dtype == dtype
    assert {state[name].dtype for name in ("step", "num_averaged")} == {FLOAT}


@pytest.mark.parametrize(
    ("shape", "own"),
    [
        ((), dict(variance=())),
        ((5,), dict(variance=(5,))),
        ((3, 4), dict(row_var=(3, 1), col_var=(1, 4))),
        ((2, 3, 4), dict(row_var=(2, 3, 1), col_var=(2, 1, 4))),
        ((3, 1), dict(row_var=(3, 1), col_var=(1, 1))),
    ],
    ids=str,
)
@pytest.mark.parametrize("state_dtype", [FLOAT, "int8"], ids=str)
def test_a_rule_may_keep_state_of_its_own_shapes_and_its_stages_keep_the_parameters(shape, own, state_dtype):
    state = state_after_a_step(Adafactor, BFLOAT, shape, average=EMA(), rounding="kahan", state_dtype=state_dtype)
    numbers = {name: tuple(value.shape) for name, value in state.items() if not name.endswith("_scale")}
    assert numbers == own | dict(ema=shape, compensation=shape, step=(), num_averaged=())


def test_state_of_its_own_shape_is_kept_from_step_to_step_beside_a_transposed_parameter():
    p = torch.ones(4, 3).t().requires_grad_()
    optimizer = Adafactor([p], average=EMA())
    for _ in range(3):
        p.grad = torch.ones(3, 4)
        optimizer.step()
        held, plan = optimizer.state[p]["row_var"], optimizer._engine.plan
        optimizer.step()
        assert optimizer.state[p]["row_var"] is held
        assert optimizer._engine.plan is plan
    assert optimizer.state[p]["ema"].stride() == p.stride()


def test_counters_are_0_d_as_torch_has_them():
    state = state_after_a_step(AdamW, average=EMA())
    assert state["step"].shape == state["num_averaged"].shape == ()
    assert state["step"] == state["num_averaged"] == 1


def test_every_parameter_counts_its_own_steps():
    params = [torch.ones(2, requires_grad=True) for _ in range(3)]
    optimizer = AdamW(params)
    for step in range(3):
        for number, p in enumerate(params):
            p.grad = torch.ones(2) if number <= step else None
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 2, 1]


def test_a_parameter_without_a_gradient_has_no_state():
    used, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    used.grad = torch.ones(2)
    optimizer = AdamW([used, unused], average=EMA())
    optimizer.step()
    assert not optimizer.state.get(unused)
    assert set(optimizer.state_dict()["state"]) == {0}


def test_state_lies_in_memory_as_its_parameter_does():
    p = torch.ones(4, 3, dtype=torch.bfloat16).t().requires_grad_()
    p.grad = torch.ones(3, 4, dtype=torch.bfloat16)
    optimizer = AdamW([p], average=EMA(), rounding="kahan")
    optimizer.step()
    for name in ("exp_avg", "exp_avg_sq", "ema", "compensation"):
        assert optimizer.state[p][name].stride() == p.stride()


def test_bf16_moments_round_what_fp32_moments_hold():
    fine = state_after_a_step(AdamW, betas=(0.3, 0.7))
    coarse = state_after_a_step(AdamW, betas=(0.3, 0.7), state_dtype=torch.bfloat16)
    for name in ("exp_avg", "exp_avg_sq"):
        # One of the two neighbors, by the random bits of the element.
        nearest, off = fine[name].bfloat16(), coarse[name].float() - fine[name]
        assert (coarse[name] != nearest).any() and (off.abs() < nearest.float().abs() * 2**-7).all()
