# SPDX-License-Identifier: Apache-2.0
"""From one precision to another and back, for drawn rules, sizes and numbers: exact where it can be, else bounded."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_optkit.averaging import EMA
from lightning_optkit.optimizers import SGD, AdamW, Lion, RMSprop
from lightning_optkit.optimizers.compressed import compressed_state_dict, widened_state_dict
from lightning_optkit.step.split_weights import LOW_ORDER_PARTS, join

RULES = {
    "SGD": (SGD, dict(lr=1e-2, momentum=0.9)),
    "AdamW": (AdamW, dict(lr=1e-2)),
    "Lion": (Lion, dict(lr=1e-3)),
    "RMSprop": (RMSprop, dict(lr=1e-2)),
}
AVERAGES = [None, EMA(0.9), EMA(0.9, dtype=torch.bfloat16)]
# 8 bits of a correction are units of 256, rounded stochastically.
UNITS = {"split32": 0, "split24": 256}

rules = st.sampled_from(sorted(RULES))
sizes = st.integers(1, 300)
seeds = st.integers(0, 2**31 - 1)
splits = st.sampled_from(sorted(UNITS))
state_dtypes = st.sampled_from([torch.float32, torch.bfloat16, "int8"])
finite = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


def numbers_of(size, seed):
    """Normal numbers of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator) * 10 ** (8 * torch.rand(size, generator=generator) - 4)


def trained(rule, size, seed, steps=3, dtype=torch.bfloat16, **stages):
    cls, kwargs = RULES[rule]
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(numbers_of(size, seed).to(dtype))
    optimizer = cls(model.parameters(), **kwargs, **stages)
    go_on(model, optimizer, seed, steps)
    return model, optimizer


def go_on(model, optimizer, seed, steps=2):
    for step in range(steps):
        model.weight.grad = numbers_of(model.weight.numel(), seed + step + 1).to(model.weight.dtype)
        optimizer.step()


def contents(model, optimizer):
    return [model.weight.detach(), *(value for _, value in sorted(optimizer.state[model.weight].items()))]


def units_between(a, b):
    """Distance of fp32 numbers in units of the last place."""
    whole = [np.int64(x.numpy().view(np.int32)) for x in (a, b)]
    ordered = [np.where(bits < 0, -(bits & 0x7FFFFFFF), bits) for bits in whole]
    return int(np.abs(ordered[0] - ordered[1]).max(initial=0))


@given(
    rules,
    sizes,
    seeds,
    st.sampled_from(["nearest", "stochastic", "kahan", *UNITS]),
    state_dtypes,
    st.sampled_from(AVERAGES),
)
def test_a_run_continues_from_its_state_dict_by_the_same_bits(rule, size, seed, rounding, state_dtype, average):
    stages = dict(rounding=rounding, state_dtype=state_dtype, average=average)
    model, optimizer = trained(rule, size, seed, **stages)
    again = copy.deepcopy(model)
    cls, kwargs = RULES[rule]
    loaded = cls(again.parameters(), **kwargs, **stages)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in ((model, optimizer), (again, loaded)):
        go_on(one, other, seed + 10)
    for ours, theirs in zip(contents(model, optimizer), contents(again, loaded), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0, equal_nan=True)


@given(st.lists(finite, min_size=1, max_size=40), splits)
def test_any_weights_in_fp32_come_back_from_split_ones(values, rounding):
    weights = {"weight": torch.tensor(values)}
    model, optimizer = trained("AdamW", len(values), 0, steps=1, rounding=rounding)
    optimizer.load_full_precision_state_dict(model, weights)
    back = optimizer.full_precision_state_dict(model)["weight"]
    is_largest = weights["weight"].abs() > 3.38e38  # the next bf16 number is infinite
    assert units_between(back[~is_largest], weights["weight"][~is_largest]) <= UNITS[rounding] // 2
    optimizer.load_full_precision_state_dict(model, {"weight": back})
    assert torch.equal(optimizer.full_precision_state_dict(model)["weight"], back)


@given(rules, sizes, seeds, splits, splits)
def test_weights_move_from_one_split_to_the_other_and_back(rule, size, seed, first, second):
    model, optimizer = trained(rule, size, seed, rounding=first)
    before = optimizer.full_precision_state_dict(model)["weight"]
    for rounding in (second, first):
        optimizer.param_groups[0].update(rounding=rounding, lr=0.0)
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        parts = [name for name in LOW_ORDER_PARTS.values() if name in optimizer.state[model.weight]]
        assert parts == [LOW_ORDER_PARTS[rounding]]
        after = optimizer.full_precision_state_dict(model)["weight"]
        # Two conversions, and two stores of a step.
        assert units_between(after, before) <= 4 * max(UNITS[first], UNITS[second])
    part = optimizer.state[model.weight][LOW_ORDER_PARTS[first]]
    assert torch.equal(join(model.weight, part), after)


@given(rules, sizes, seeds, st.sampled_from(["int8", torch.bfloat16]))
def test_moments_are_compressed_within_their_bound_and_only_once(rule, size, seed, dtype):
    model, optimizer = trained(rule, size, seed, dtype=torch.float32)
    saved = compressed_state_dict(optimizer, dtype)
    wide = widened_state_dict(saved)["state"][0]
    for name, value in optimizer.state[model.weight].items():
        if value.dim() == 0:
            continue
        blocks = torch.nn.functional.pad(value.abs(), (0, -size % 128)).view(-1, 128).amax(1)
        least = blocks.repeat_interleave(128)[:size] * 2.0**-15 if dtype == "int8" else torch.zeros(size)
        bound = value.abs() / (16 if dtype == "int8" else 256)
        kept = wide[name].float()
        assert bool(((kept - value).abs() <= torch.maximum(bound * 1.0001, least)).all()), name
    loaded = RULES[rule][0](model.parameters(), **RULES[rule][1])
    loaded.load_state_dict(saved)
    twice = compressed_state_dict(loaded, dtype)
    # The codes are the same; a scale is that of a product and a quotient by 1.875.
    torch.testing.assert_close(twice["state"], saved["state"], rtol=2**-22, atol=0)


@given(rules, sizes, seeds, state_dtypes, state_dtypes)
def test_state_of_one_dtype_continues_in_another(rule, size, seed, saved, loading):
    model, optimizer = trained(rule, size, seed, dtype=torch.float32, state_dtype=saved)
    other = copy.deepcopy(model)
    loaded = RULES[rule][0](other.parameters(), **RULES[rule][1], state_dtype=loading)
    loaded.load_state_dict(optimizer.state_dict())
    for one, stepped in ((model, optimizer), (other, loaded)):
        go_on(one, stepped, seed + 10, steps=1)
        assert bool(one.weight.isfinite().all())
    if rule != "Lion":  # whose step is a sign
        moved, same = (torch.linalg.vector_norm(m.weight.detach() - numbers_of(size, seed)) for m in (other, model))
        assert float(moved) == pytest.approx(float(same), rel=0.35)
