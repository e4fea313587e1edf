# SPDX-License-Identifier: Apache-2.0
"""bf16 weights with a correction: 16 bits of it train as fp32 does, bit for bit; 8 bits lose nothing in the mean."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_optkit import optimizers
from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm, ClipPerTensor, ClipUnitwise
from lightning_optkit.optimizers import SGD, AdamW
from lightning_optkit.step import step_in_backward
from lightning_optkit.step.split_weights import join, split_
from tests.step.split_weights_cases import ROUNDINGS, joined, pair, step_together

RULES = {
    "SGD": dict(lr=0.1, momentum=0.9),
    "Adam": dict(weight_decay=0.1),
    "AdamW": {},
    "Adagrad": {},
    "RMSprop": dict(momentum=0.9, centered=True),
    "Adadelta": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "Lion": {},
    "LAMB": {},
    "LARS": dict(lr=0.1),
    "Adan": {},
    "ADOPT": {},
    "AdEMAMix": {},
    "AdaBelief": {},
    "CAME": {},
    "SOAP": dict(precondition_frequency=3),
    "MARS": {},
    "Signum": {},
    "SophiaG": dict(eps=0.1),
    "StableAdamW": {},
    "Prodigy": {},
    "DAdaptAdam": {},
    "ScheduleFreeSGD": dict(lr=0.1),
    "ScheduleFreeAdamW": {},
    "Muon": {},
    "Adafactor": {},
}
STAGES = {
    "plain": {},
    "clip, l1": dict(clip=ClipNorm(3.0), l1=0.1),
    "clip by tensor, average": dict(clip=ClipPerTensor(2.0), average=EMA(0.9)),
    "centralized": dict(centralize=True),
    "clip by unit": dict(clip=ClipUnitwise(0.01)),
    "8-bit state": dict(state_dtype="int8"),
    "16-bit state": dict(state_dtype=torch.bfloat16),
}
PATHS = {"compiled": {}, "reference": dict(fused=False)}


def check_follows_fp32(name, stages, path, shape=(40, 19)):
    kwargs = {**RULES[name], **STAGES[stages], **PATHS[path]}
    cls = getattr(optimizers, name)
    if name == "Adafactor":
        kwargs.pop("fused", None)
    if name.startswith("ScheduleFree") and {"average", "l1"} & kwargs.keys():
        pytest.skip("it is an average itself, whose zeros are not those of the weights")
    if "state_dtype" in kwargs and name in ("ScheduleFreeSGD", "Muon"):
        pytest.skip("it refuses one of them")
    split, one, whole, other = pair(cls, kwargs, shape)
    for optimizer in (one, other) if name.startswith("ScheduleFree") else ():
        optimizer.train()
    step_together(split, one, whole, other, 12)
    assert torch.equal(joined(one, split), whole)
    for key, value in other.state[whole].items():
        assert torch.equal(one.state[split][key], value), key
    torch.testing.assert_close(split.float(), whole, rtol=2**-8, atol=0)


def test_every_rule_is_tried():
    assert RULES.keys() == {name for name in optimizers.__all__ if hasattr(getattr(optimizers, name), "_torch_class")}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("name", RULES)
def test_sixteen_bits_train_as_fp32(name, stages, path):
    check_follows_fp32(name, stages, path)


@pytest.mark.parametrize("shape", [(1,), (31,), (33,), (129,), (20_000,), (3, 0), ()], ids=str)
def test_of_every_size(shape):
    check_follows_fp32("AdamW", "plain", "compiled", shape)
    check_follows_fp32("Lion", "8-bit state", "compiled", shape)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rounding", ["split24", "split32"])
def test_small_updates_are_kept_that_rounding_to_nearest_loses(rounding, path):
    weights = {}
    for name in ("nearest", rounding):
        weights[name] = torch.ones(4096, dtype=torch.bfloat16, requires_grad=True)
        optimizer = SGD([weights[name]], lr=2**-20, rounding=name, statistics=True, **PATHS[path])
        for _ in range(500):
            weights[name].grad = torch.ones_like(weights[name])
            optimizer.step()
    assert torch.equal(weights["nearest"], torch.ones(4096, dtype=torch.bfloat16))
    (counted,) = optimizer.statistics()
    assert float(joined(optimizer, weights[rounding]).mean()) == pytest.approx(1 - 500 * 2**-20, abs=2e-6)
    # A step is a sixteenth of a unit of 8 bits: most of them change nothing, and the others make up for it.
    assert counted.lost == 0 if rounding == "split32" else 0 < counted.lost < 4096


@pytest.mark.parametrize("threads_used", [1, 2])
def test_both_paths_store_the_same_bits(threads_used, threads, frozen):
    threads(threads_used)
    found = []
    for kwargs in PATHS.values():
        split, one, whole, other = pair(SGD, dict(lr=0.1, **kwargs), (70_001,), "split24")
        step_together(split, one, whole, other, 3)
        found.append(frozen([split, one.state[split]["correction8"]]))
        assert (joined(one, split) - whole).abs().max() < 2 * 2**-15 * whole.abs().max()
    assert found[0] == found[1]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rounding", ["split24", "split32"])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_where_it_is(bad, rounding, path):
    split, one, whole, other = pair(SGD, dict(lr=1.0, **PATHS[path]), (40,), rounding)
    split.grad = torch.zeros(40, dtype=torch.bfloat16)
    split.grad[7] = bad
    whole.grad = split.grad.float()
    one.step()
    other.step()
    tolerance = 0 if rounding == "split32" else 2**-15
    torch.testing.assert_close(joined(one, split), whole.detach(), rtol=tolerance, atol=0, equal_nan=True)
    torch.testing.assert_close(split.float(), whole.detach(), rtol=2**-8, atol=0, equal_nan=True)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 2**32 - 1))
def test_any_number_is_split_and_joined(number, random):
    value = torch.tensor([number])
    param, whole, part = torch.empty(1).bfloat16(), torch.empty(1, dtype=torch.int16), torch.empty(1, dtype=torch.int8)
    split_(param, whole, value)
    # Half of bf16's least number, 2^-134, is flushed; beyond its largest number a parameter is infinite.
    expected = value if param != 0 and param.isfinite() else param.float()
    assert torch.equal(join(param, whole).view(torch.int32), expected.view(torch.int32))
    split_(param, part, value, torch.tensor([random]))
    if param.isfinite():
        error = (join(param, part) - value).abs()
        assert error <= (max(abs(number) * 2**-15, 2.0**-141) if param != 0 else 2.0**-133)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("after", ROUNDINGS)
@pytest.mark.parametrize("before", ROUNDINGS)
def test_the_rest_of_a_weight_outlives_another_rounding(before, after, path):
    split, one, whole, other = pair(SGD, dict(lr=1e-3, **PATHS[path]), rounding=before)
    step_together(split, one, whole, other, 20)
    one.param_groups[0]["rounding"] = after
    step_together(split, one, whole, other, 1, scale=0.0)
    state = one.state[split]
    (rest,) = {"compensation", "correction8", "correction16"} & state.keys()
    kept = split.float() + state[rest].float() if rest == "compensation" else join(split, state[rest])
    assert rest == {"kahan": "compensation", "split24": "correction8", "split32": "correction16"}[after]
    assert (kept - whole).abs().max() < 2**-13 * whole.abs().max()
    assert (split.float() - whole).abs().max() > 4 * (kept - whole).abs().max()  # which the weights alone do not hold


def test_goes_through_state_dicts_files_and_copies():
    split, one, whole, other = pair(AdamW, {})
    step_together(split, one, whole, other, 3)
    file = io.BytesIO()
    torch.save([split, one.state_dict()], file)
    file.seek(0)
    weights, state_dict = torch.load(file, weights_only=True)
    again = weights.detach().requires_grad_()
    loaded = AdamW([again], rounding="split32")
    loaded.load_state_dict(state_dict)
    copied = copy.deepcopy(one)
    (copy_of,) = copied.param_groups[0]["params"]
    whole.grad = split.grad.float()
    for param, optimizer in ((again, loaded), (copy_of, copied)):
        assert torch.equal(joined(optimizer, param), whole)
        param.grad = split.grad.clone()
        optimizer.step()
    other.step()
    assert torch.equal(joined(loaded, again), whole)
    assert torch.equal(joined(copied, copy_of), whole)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("correction16", torch.zeros(40, 19, dtype=torch.int8), "must be int16, got int8"),
        ("correction16", torch.zeros(40, 19, dtype=torch.int32), "must be int16, got int32"),
        ("correction16", torch.zeros(3, dtype=torch.int16), r"has shape \[3\]"),
        ("correction16", 5, "must be a tensor"),
    ],
)
def test_refuses_a_correction_that_is_none(name, value, words, snapshot):
    split, one, whole, other = pair(AdamW, {})
    step_together(split, one, whole, other, 1)
    state_dict = copy.deepcopy(one.state_dict())
    state_dict["state"][0][name] = value
    before = snapshot(one)
    with pytest.raises((TypeError, ValueError), match=words):
        one.load_state_dict(state_dict)
    assert snapshot(one) == before


@pytest.mark.parametrize("rounding", ["split24", "split32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_parameters_have_no_rest(dtype, rounding):
    params = [torch.ones(5, dtype=dtype, requires_grad=True) for _ in range(2)]
    for param, kwargs in zip(params, (dict(rounding=rounding), {}), strict=True):
        optimizer = AdamW([param], **kwargs)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert not {"correction8", "correction16", "compensation"} & optimizer.state[param].keys()
    assert torch.equal(*params)


def test_refuses_fp16():
    param = torch.ones(3, dtype=torch.float16, requires_grad=True)
    optimizer = AdamW([param])
    optimizer.param_groups[0]["rounding"] = "split32"
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"AdamW\(rounding='split32'\): a parameter of shape \[3\] is float16"):
        optimizer.step()
    assert torch.equal(param, torch.ones_like(param))


@pytest.mark.parametrize(("rounding", "bytes_of_it"), [("split24", 1), ("split32", 2)])
def test_its_bytes_are_read_and_written(rounding, bytes_of_it):
    param = torch.ones(1000, dtype=torch.bfloat16, requires_grad=True)
    (plan,) = AdamW([param], rounding=rounding, state_dtype="int8").explain().groups
    assert plan.stages[-1] == rounding
    weights, moments = 3 * 2, 2 * 2  # of 16 bits: read, written, and the gradient; two moments of 8 bits
    assert plan.bytes_moved == 1000 * (weights + moments + 2 * bytes_of_it)


def test_clips_by_units_of_the_stored_weights():
    split, one, whole, other = pair(SGD, dict(lr=0.1, clip=ClipUnitwise(0.01)))
    step_together(split, one, whole, other, 5)
    torch.testing.assert_close(joined(one, split), whole.detach(), rtol=1e-4, atol=1e-4)


def test_steps_inside_the_backward_pass():
    torch.manual_seed(0)
    models = [nn.Linear(7, 3).bfloat16() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ones = [AdamW(model.parameters(), lr=1e-4, rounding="split24") for model in models]
    handle = step_in_backward(ones[1])
    for seed in range(4):
        x = torch.randn(8, 7, generator=torch.Generator().manual_seed(seed)).bfloat16()
        for model, optimizer in zip(models, ones, strict=True):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    handle.remove()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(joined(ones[0], p), joined(ones[1], q))


def test_what_an_earlier_rounding_left_is_looked_at_before_it_is_used(snapshot):
    split, one, whole, other = pair(SGD, dict(lr=0.1), rounding="kahan")
    step_together(split, one, whole, other, 2)
    one.state[split]["compensation"] = torch.zeros(3)
    one.param_groups[0]["rounding"] = "split32"
    before = snapshot(one)
    with pytest.raises(ValueError, match=r"the state 'compensation' has shape \[3\]"):
        one.step()
    assert snapshot(one) == before


@pytest.mark.parametrize("rounding", ["split24", "split32"])
@pytest.mark.parametrize(
    "cut", [lambda x: x[:, :4], lambda x: x[:, ::2], lambda x: x[0, ::2]], ids=["left", "steps", "row"]
)
def test_views_with_gaps_train_as_fp32(rounding, cut):
    whole = torch.randn(8, 8).bfloat16()
    before, view = whole.clone(), torch.nn.Parameter(cut(whole))
    wide = torch.nn.Parameter(view.detach().float())
    steps = [AdamW([view], lr=1e-3, rounding=rounding, fused=False), AdamW([wide], lr=1e-3, fused=False)]
    for _ in range(20):
        view.grad = torch.randn_like(view)
        wide.grad = view.grad.float()
        for optimizer in steps:
            optimizer.step()
    model = torch.nn.Module()
    model.view = view
    stored = steps[0].full_precision_state_dict(model)["view"]
    torch.testing.assert_close(stored, wide.detach(), rtol=0, atol=0 if rounding == "split32" else 1e-3)
    cut(whole).copy_(cut(before))
    assert torch.equal(whole, before)  # nothing between was written
