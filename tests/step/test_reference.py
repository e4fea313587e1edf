# SPDX-License-Identifier: Apache-2.0
"""The plain-PyTorch step: against the formulas of its stages, and against the compiled step under any combination."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_optkit._native import extension
from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm, ClipPerTensor, ClipUnitwise, ClipValue, ZClip
from lightning_optkit.optimizers import SGD, Adam, AdamW
from lightning_optkit.step.gradient_reference import norm_reference

PATHS = pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# After 3 steps on numbers below 4. What is held in 16 bits may fall on the other side of a tie at each step.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 3 * 2**-6, torch.float16: 3 * 2**-9}
STATE_TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 3 * 2**-6, torch.float16: 3 * 2**-9}


# --- the formulas ---


def after_one_step(optimizer_class, param, grad, fused, **kwargs):
    p = torch.tensor(param, dtype=torch.float64, requires_grad=True)
    p.grad = torch.tensor(grad, dtype=torch.float64)
    optimizer_class([p], fused=fused, **kwargs).step()
    return p.tolist()


@PATHS
def test_l1_shrinks_towards_zero_and_makes_exact_zeros(fused):
    moved = after_one_step(SGD, [1.0, -1.0, 0.05, -0.05, 0.3], [0.0, 0.0, 0.0, 0.0, 2.0], fused, lr=0.1, l1=1.0)
    assert moved == pytest.approx([0.9, -0.9, 0.0, 0.0, 0.0], abs=1e-15)
    assert moved[2:4] == [0.0, 0.0]


@PATHS
def test_cautious_decay_spares_elements_that_the_update_moves_away_from_zero(fused):
    # The update has the sign of the gradient, and is subtracted: against the sign of the parameter it moves away.
    kwargs = dict(lr=0.1, weight_decay=0.5, eps=0.0, betas=(0.0, 0.0))
    moved = after_one_step(AdamW, [2.0, 2.0, -2.0, -2.0], [1.0, -1.0, 1.0, -1.0], fused, cautious=True, **kwargs)
    assert moved == pytest.approx([1.8, 2.1, -2.1, -1.8], abs=1e-14)
    moved = after_one_step(AdamW, [2.0, 2.0, -2.0, -2.0], [1.0, -1.0, 1.0, -1.0], fused, cautious=False, **kwargs)
    assert moved == pytest.approx([1.8, 2.0, -2.0, -1.8], abs=1e-14)


@PATHS
def test_centralizing_takes_the_mean_of_each_row_off_after_the_value_clip_and_before_l2(fused):
    grad = [[3.0, 0.5, -0.5, 0.0], [0.1, 0.2, 0.3, 0.4]]
    kwargs = dict(lr=1.0, weight_decay=0.5, clip=ClipValue(1.0), centralize=True)
    moved = after_one_step(SGD, [[1.0] * 4] * 2, grad, fused, **kwargs)
    expected = [[1 - (g - 0.25) - 0.5 for g in (1.0, 0.5, -0.5, 0.0)], [1 - (g - 0.25) - 0.5 for g in grad[1]]]
    torch.testing.assert_close(torch.tensor(moved), torch.tensor(expected), rtol=0, atol=1e-6)
    assert after_one_step(SGD, [1.0, 1.0], [2.0, 4.0], fused, lr=1.0, centralize=True) == [-1.0, -3.0]


@PATHS
def test_value_clip_comes_before_l2(fused):
    moved = after_one_step(SGD, [10.0, -10.0], [100.0, 0.5], fused, lr=0.1, weight_decay=0.2, clip=ClipValue(1.0))
    assert moved == pytest.approx([10 - 0.1 * (1.0 + 2.0), -10 - 0.1 * (0.5 - 2.0)], abs=1e-14)


@PATHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kahan_summation_keeps_twice_the_digits(dtype, fused):
    torch.manual_seed(0)
    p = torch.randn(1000).clamp(-3.9, 3.9).to(dtype).requires_grad_()
    exact, eps = p.detach().double(), torch.finfo(dtype).eps
    optimizer = SGD([p], lr=1e-3, rounding="kahan", fused=fused)
    for _ in range(100):
        p.grad = torch.randn(1000).to(dtype)
        exact -= 1e-3 * p.grad.double()
        optimizer.step()
    held = p.detach().double() + optimizer.state[p]["compensation"].double()
    assert (held - exact).abs().max() < 10 * eps**2  # each step rounds a compensation below eps by eps^2 / 2
    assert (p.detach().double() - exact).abs().max() < 1.1 * eps  # half the distance of two numbers in [2, 4)


def test_the_norm_counts_and_leaves_out_what_is_not_finite():
    grad = torch.tensor([3.0, math.inf, -4.0, math.nan, -math.inf])
    assert norm_reference(grad) == (25.0, 3.0)


def test_the_norm_is_summed_in_double_precision():
    assert norm_reference(torch.tensor([1e30, 1e30])) == (pytest.approx(2e60), 0.0)


@pytest.mark.parametrize(
    "grad",
    [torch.tensor([3 + 4j]), torch.tensor([[0.0, 5.0]]).to_sparse(), torch.tensor([3.0, 4.0]).to_sparse()],
    ids=["complex", "sparse", "another sparse"],
)
def test_the_norm_of_complex_and_sparse_gradients(grad):
    assert norm_reference(grad) == (pytest.approx(25.0), 0.0)


# --- the compiled step is the reference step ---


class Setting:
    """One draw of everything that can be switched on."""

    rules = st.sampled_from(
        [
            (SGD, dict()),
            (SGD, dict(momentum=0.9, dampening=0.1)),
            (SGD, dict(momentum=0.9, nesterov=True)),
            (Adam, dict()),
            (AdamW, dict(amsgrad=True, betas=(0.5, 0.9))),
        ]
    )
    stages = st.fixed_dictionaries(
        dict(
            weight_decay=st.sampled_from([0.0, 0.1]),
            maximize=st.booleans(),
            clip=st.sampled_from(
                [None, ClipNorm(0.5), ClipValue(0.3), ClipPerTensor(0.4), ClipUnitwise(0.2), ZClip(1.0, warmup_steps=2)]
            ),
            average=st.sampled_from([None, EMA(0.9), EMA(0.5, start=2, every=2)]),
            l1=st.sampled_from([0.0, 0.05]),
            cautious=st.booleans(),
            centralize=st.booleans(),
            rounding=st.sampled_from(["nearest", "stochastic", "kahan"]),
            state_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
            statistics=st.booleans(),
        )
    )


def run(optimizer_class, shapes, dtypes, seed, scale, **kwargs):
    torch.manual_seed(seed)
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape, dtype in zip(shapes, dtypes, strict=True)]
    optimizer = optimizer_class(params, lr=0.1, **copy.deepcopy(kwargs))  # a clip may learn
    optimizer.grad_scale = torch.tensor(scale)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape).mul(scale).to(p.dtype)
        optimizer.step()
    return params, optimizer


@pytest.mark.skipif(extension is None, reason="no compiled extension")
@given(
    rule=Setting.rules,
    stages=Setting.stages,
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1.0, 8.0]),
)
def test_the_compiled_step_is_the_reference_step(rule, stages, dtypes, seed, scale):
    optimizer_class, kwargs = rule
    shapes = [(3, 5), (), (41,)]
    compiled, ours = run(optimizer_class, shapes, dtypes, seed, scale, **kwargs, **stages)
    expected, reference = run(optimizer_class, shapes, dtypes, seed, scale, fused=False, **kwargs, **stages)
    # A norm over some gradients of 32 bits is known to 32 bits.
    has_norm = stages["clip"] is not None and stages["clip"].needs_norm
    least = 1e-7 if has_norm else 0.0
    for p, q in zip(compiled, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=max(TOLERANCE[p.dtype], least))
        assert ours.state[p].keys() == reference.state[q].keys()
        for name, value in reference.state[q].items():
            tolerance = max(STATE_TOLERANCE[p.dtype], STATE_TOLERANCE[value.dtype], least)
            torch.testing.assert_close(ours.state[p][name], value, rtol=0, atol=tolerance, msg=name)
    if has_norm:
        assert ours.grad_norm == pytest.approx(reference.grad_norm, rel=1e-6)
        assert ours.grad_norm_clipped == pytest.approx(reference.grad_norm_clipped, rel=1e-6)
        assert ours.num_clipped == reference.num_clipped
