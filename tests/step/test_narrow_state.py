# SPDX-License-Identifier: Apache-2.0
"""State in 16 and in 8 bits is unbiased: slow averages follow those in fp32 on every rule."""

import pytest
import torch

from lightning_optkit import optimizers
from lightning_optkit._native import extension
from lightning_optkit.optimizers import AdamW, RMSprop
from lightning_optkit.step.quantized_state import dequantize8
from lightning_optkit.step.rounding import round_stochastically

# Slow averages, whose changes are far below half a unit in the last place of bf16.
SLOW = {
    "SGD": dict(lr=1e-3, momentum=0.99),
    "Adam": {},
    "AdamW": dict(amsgrad=True),
    "Adagrad": {},
    "RMSprop": dict(alpha=0.999, momentum=0.9),
    "Adadelta": dict(rho=0.999),
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "Adafactor": dict(lr=1e-3),
    "Lion": dict(betas=(0.9, 0.999)),
    "LAMB": {},
    "LARS": dict(lr=1e-2),
    "Adan": {},
    "ADOPT": {},
    "AdEMAMix": {},
    "AdaBelief": dict(betas=(0.9, 0.9999)),  # a constant gradient leaves nothing but rounding in its variance
    "CAME": {},
    "SOAP": dict(betas=(0.95, 0.999)),
    "MARS": {},
    "Signum": dict(momentum=0.999),
    "SophiaG": dict(eps=0.1),
    "StableAdamW": {},
    "Prodigy": {},
    "DAdaptAdam": dict(d0=1e-3, growth_rate=1.0),  # a constant gradient has its minimum at infinity
    "ScheduleFreeAdamW": {},
    "Muon": {},
}
ELEMENTS = 512

# A state beside fp32's, in the mean over its elements. In 8 bits the error of a number is up to an eighth, so what is
# made of single numbers is larger in the mean: a maximum over steps, and the magnitude of an average of noise.
TOLERANCE = {torch.bfloat16: 0.03, "int8": 0.06}
LESS_EXACT_IN_8_BITS = {
    ("AdamW", "max_exp_avg_sq"): 0.5,
    ("AdEMAMix", "exp_avg_slow"): 0.5,
    ("DAdaptAdam", "s"): 0.35,
    ("Lion", "exp_avg"): 0.35,
    ("RMSprop", "momentum_buffer"): 0.25,
    ("Signum", "exp_avg"): 0.35,
}
# How far noise moves a weight: with Lion about 8 % further than in fp32, since its update is a sign.
MOVES_FURTHER_IN_8_BITS = {"Lion": 0.25}
# The size of a step is made of the step before, so that errors grow: by noise the runs part whatever the precision.
FEEDS_ITS_STEPS_BACK = {"Adadelta", "Prodigy"}


def gradients(kind, steps):
    generator = torch.Generator().manual_seed(0)
    sign = torch.randn(ELEMENTS, generator=generator).sign()
    for step in range(steps):
        noise = torch.randn(ELEMENTS, generator=generator)
        falling = 1.0 if step < steps // 2 else 0.1
        yield {"constant": 1e-2 * sign, "noise": noise, "variance falls tenfold": falling * noise}[kind]


def trained(name, kind, state_dtype, steps):
    """How far the parameters went, and the mean magnitude of every state by element."""
    param = torch.ones((16, ELEMENTS // 16) if name == "Muon" else ELEMENTS).requires_grad_()
    optimizer = getattr(optimizers, name)([param], state_dtype=state_dtype, **SLOW[name])
    if name.startswith("ScheduleFree"):
        optimizer.train()
    for grad in gradients(kind, steps):
        param.grad = grad.view_as(param)
        optimizer.step()
    state, magnitudes = optimizer.state[param], {}
    for spec in optimizer._rule(optimizer.param_groups[0]).states:
        value = state.get(spec.name)
        if value is None or value.numel() < ELEMENTS:
            continue
        if value.dtype == torch.uint8:
            value = dequantize8(value, state[f"{spec.name}_scale"], signed=not spec.nonnegative)
        magnitudes[spec.name] = float(value.float().abs().mean())
    return float((param.detach() - 1).abs().mean()), magnitudes


def check(name, kind, state_dtype, steps):
    if kind != "constant" and name in FEEDS_ITS_STEPS_BACK:
        pytest.skip("its steps feed back")
    if state_dtype == "int8" and name == "Muon":
        pytest.skip("no state in 8 bits")
    moved, states = trained(name, kind, state_dtype, steps)
    expected, references = trained(name, kind, torch.float32, steps)
    wide = kind != "constant" and state_dtype == "int8"
    further = MOVES_FURTHER_IN_8_BITS.get(name, 0.12)
    assert moved == pytest.approx(expected, rel=further if wide else TOLERANCE[state_dtype])
    assert states.keys() == references.keys()
    for state, magnitude in states.items():
        if not 0 < references[state] < float("inf"):
            continue  # Adan's difference of two equal gradients
        looser = LESS_EXACT_IN_8_BITS.get((name, state), TOLERANCE["int8"])
        assert magnitude == pytest.approx(references[state], rel=looser if wide else TOLERANCE[state_dtype]), state


def test_every_rule_with_narrow_state_is_tried():
    rules = {name for name in optimizers.__all__ if hasattr(getattr(optimizers, name), "_torch_class")}
    assert SLOW.keys() == rules - {"ScheduleFreeSGD"}  # which keeps a point and no average


KINDS = ["constant", "noise", "variance falls tenfold"]


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SLOW)
def test_a_slow_average_moves_as_in_fp32(name, kind, state_dtype):
    check(name, kind, state_dtype, steps=1000)


@pytest.mark.slow
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SLOW)
def test_and_over_five_thousand_steps(name, kind, state_dtype):
    check(name, kind, state_dtype, steps=5000)


@pytest.mark.parametrize("fused", [None, False])
def test_a_constant_gradient_moves_a_weight_by_the_learning_rate(fused):
    param = torch.zeros(256, requires_grad=True)
    optimizer = AdamW([param], lr=1e-3, weight_decay=0, state_dtype=torch.bfloat16, fused=fused)
    for _ in range(5000 if fused is None else 1500):
        param.grad = torch.full((256,), 1e-4)
        optimizer.step()
    # Each step is `lr`, less what eps = 1e-8 takes of a gradient of 1e-4.
    torch.testing.assert_close(param.mean(), torch.tensor(-1e-3 * (5000 if fused is None else 1500)), rtol=0.01, atol=0)


@pytest.mark.skipif(extension is None, reason="the extension is not built")
@pytest.mark.parametrize("threads_used", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 31, 33, 128, 5000, 70_000])
def test_both_paths_round_state_by_the_same_bits(size, dtype, threads_used, threads, frozen):
    threads(threads_used)
    torch.manual_seed(size)
    start, grads = torch.randn(size), [torch.randn(size) for _ in range(3)]
    states = []
    for fused in (None, False):
        param = start.to(dtype).requires_grad_()
        # Momentum alone: its update has no root and no quotient, in which two paths may differ by a last place.
        optimizer = optimizers.SGD(
            [param], lr=0.5, momentum=0.5, dampening=0.5, state_dtype=torch.bfloat16, rounding="stochastic", fused=fused
        )
        for grad in grads:
            param.grad = grad.to(dtype)
            optimizer.step()
        states.append(frozen(optimizer.state[param]["momentum_buffer"]))
    assert states[0] == states[1]


def test_states_and_the_parameter_are_rounded_by_bits_of_their_own():
    value = torch.full((20_000,), 1 + 2**-8)  # halfway between two bf16 numbers
    errors = [
        round_stochastically(value, torch.bfloat16, 0, 1, 0, state=state).float() - value for state in (None, 0, 1, 2)
    ]
    together = torch.corrcoef(torch.stack(errors)).fill_diagonal_(0.0)
    assert together.abs().max() < 0.03


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so_in_16_bits(bad, fused):
    param = torch.ones(40, requires_grad=True)
    optimizer = optimizers.SGD([param], lr=0.1, momentum=0.9, state_dtype=torch.bfloat16, fused=fused)
    param.grad = torch.ones(40)
    param.grad[7] = bad
    optimizer.step()
    buffer = optimizer.state[param]["momentum_buffer"].float()
    torch.testing.assert_close(buffer, param.grad, equal_nan=True)


@pytest.mark.parametrize("fused", [None, False])
def test_a_centered_variance_that_rounds_below_zero_is_zero(fused):
    param = torch.ones(256, requires_grad=True)
    optimizer = RMSprop([param], lr=1e-9, alpha=0.9, centered=True, state_dtype=torch.bfloat16, fused=fused)
    for _ in range(300):
        param.grad = torch.full((256,), 0.3)
        optimizer.step()
    assert param.isfinite().all()


@pytest.mark.parametrize(("small", "share"), [(1e-3, 1.0), (1e-5, 0.62), (1e-6, 0.08)])
def test_in_8_bits_a_gradient_far_below_that_of_its_block_moves_less(small, share):
    moved = {}
    for state_dtype in (torch.float32, "int8"):
        weights = [torch.nn.Parameter(torch.zeros(128)) for _ in range(20)]
        optimizer = AdamW(weights, lr=0.01, weight_decay=0.0, state_dtype=state_dtype)
        for _ in range(50):
            for weight in weights:
                weight.grad = torch.full((128,), small)
                weight.grad[0] = 1.0
            optimizer.step()
        moved[state_dtype] = torch.stack([weight[1:].detach().abs().mean() for weight in weights]).mean()
    assert moved["int8"] / moved[torch.float32] == pytest.approx(share, abs=0.03)
