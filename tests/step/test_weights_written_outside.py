# SPDX-License-Identifier: Apache-2.0
"""Split weights that somebody else writes, casts or loads between two steps."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_optkit.averaging import EMA
from lightning_optkit.optimizers import SGD, AdamW, ScheduleFreeAdamW
from lightning_optkit.optimizers.convert import from_torch_, full_precision_state_dict, to_torch_

PATHS = {"compiled": {}, "reference": dict(fused=False)}
SPLITS = ["split24", "split32"]


def trained(rounding, cls=AdamW, steps=3, **kwargs):
    """A bf16 parameter of 500 elements, and its optimizer after some steps."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(500).bfloat16())
    optimizer = cls([weight], lr=1e-2, rounding=rounding, **kwargs)
    if cls is ScheduleFreeAdamW:
        optimizer.train()
    for _ in range(steps):
        step(optimizer, weight)
    return weight, optimizer


def step(optimizer, weight, grad=None):
    weight.grad = torch.randn(500).to(weight.dtype) if grad is None else grad
    optimizer.step()


def model_of(weight):
    model = nn.Module()
    model.weight = weight
    return model


def exported(optimizer, weight):
    return optimizer.full_precision_state_dict(model_of(weight))["weight"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rounding", SPLITS)
@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf])
def test_no_written_value_becomes_nan(value, rounding, path):
    weight, optimizer = trained(rounding, SGD, **PATHS[path])
    with torch.no_grad():
        weight[::2] = value
    before = exported(optimizer, weight)
    step(optimizer, weight, torch.zeros_like(weight))
    for seen in (before, exported(optimizer, weight), weight.detach().float()):
        assert not seen.isnan().any()
        if value == 0:
            assert seen[::2].abs().max() < 1e-38
        else:  # at most half a unit in the last place of bf16 below infinity
            assert (seen[::2] * math.copysign(1.0, value)).min() > 3.3e38


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rounding", SPLITS)
def test_a_written_weight_is_off_by_half_a_unit_of_bf16_at_most(rounding, path):
    weight, optimizer = trained(rounding, SGD, **PATHS[path])
    with torch.no_grad():
        weight.copy_(torch.randn(500))
    given = weight.detach().float()
    step(optimizer, weight, torch.zeros_like(weight))
    assert ((exported(optimizer, weight) - given).abs() <= given.abs() * 2**-8).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_kahan_summation_kept_of_a_former_larger_weight_is_dropped(dtype, path):
    weight = nn.Parameter(torch.full((500,), 100.3, dtype=dtype))
    optimizer = SGD([weight], lr=1e-3, rounding="kahan", **PATHS[path])
    for _ in range(3):
        step(optimizer, weight)
    assert (optimizer.state[weight]["compensation"] != 0).any()
    written = torch.tensor([0.0, -0.0, 1e-3, -1.5, 300.0]).repeat(100).to(dtype)
    with torch.no_grad():
        weight.copy_(written)
    step(optimizer, weight, torch.zeros_like(weight))
    assert torch.equal(weight[written == 0].signbit(), written[written == 0].signbit())
    assert ((weight - written).abs() <= written.abs() * torch.finfo(dtype).eps).all()
    rest = optimizer.state[weight]["compensation"].double()
    assert (rest.abs() <= written.double().abs() * torch.finfo(dtype).eps / 2).all()


@pytest.mark.parametrize("rounding", [*SPLITS, "kahan"])
def test_weights_that_were_pruned_are_exported_as_zeros(rounding):
    weight, optimizer = trained(rounding, SGD)
    with torch.no_grad():
        weight[::2] = 0.0
    assert (exported(optimizer, weight)[::2] == 0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rounding", SPLITS)
def test_a_weight_set_to_infinity_is_infinite(rounding, sign, path):
    weight, optimizer = trained(rounding, SGD, **PATHS[path])
    with torch.no_grad():
        weight[::2] = sign * math.inf
    assert (exported(optimizer, weight)[::2] == sign * math.inf).all()
    step(optimizer, weight, torch.zeros_like(weight))
    assert (weight[::2] == sign * math.inf).all()
    assert weight[1::2].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("wanted", ["nearest", "stochastic"])
@pytest.mark.parametrize("rounding", [*SPLITS, "kahan"])
def test_a_rounding_without_low_order_part_drops_it(rounding, wanted, path):
    weight, optimizer = trained(rounding, **PATHS[path])
    optimizer.param_groups[0]["rounding"] = wanted
    step(optimizer, weight)
    assert not {"correction8", "correction16", "compensation"} & optimizer.state[weight].keys()
    assert torch.equal(exported(optimizer, weight), weight.float())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounding", SPLITS)
def test_a_cast_model_trains_on(dtype, rounding, path):
    weight, optimizer = trained(rounding, **PATHS[path])
    weight.data = weight.data.to(dtype)
    twin = weight.detach().clone().requires_grad_()
    other = AdamW([twin], lr=1e-2, **PATHS[path])
    other.load_state_dict({**optimizer.state_dict(), "param_groups": other.state_dict()["param_groups"]})
    for _ in range(2):
        grad = torch.randn(500, dtype=dtype)
        step(optimizer, weight, grad)
        step(other, twin, grad.clone())
    assert torch.equal(weight, twin)
    assert optimizer.state[weight]["step"] == 5
    assert not {"correction8", "correction16"} & optimizer.state[weight].keys()


def narrow_model():
    torch.manual_seed(0)
    return nn.Linear(9, 5).bfloat16()


@pytest.mark.parametrize("rounding", [*SPLITS, "kahan", "stochastic"])
def test_the_rounding_of_an_fp32_run_is_not_taken_over(rounding):
    whole = nn.Linear(9, 5)
    other = SGD(whole.parameters(), lr=0.1, momentum=0.9)
    whole(torch.randn(3, 9)).sum().backward()
    other.step()
    model = narrow_model()
    optimizer = SGD(model.parameters(), lr=0.5, momentum=0.9, rounding=rounding)
    said = rf"^SGD.load_state_dict\(state_dict=...\): continues rounding='nearest' of the checkpoint as '{rounding}'\.$"
    with pytest.warns(UserWarning, match=said):
        optimizer.load_state_dict(other.state_dict())
    assert (optimizer.param_groups[0]["rounding"], optimizer.param_groups[0]["lr"]) == (rounding, 0.1)


def test_fp32_weights_are_not_said_to_be_rounded_otherwise(recwarn):
    whole, split = nn.Linear(9, 5), SGD([nn.Parameter(torch.ones(3).bfloat16())], lr=0.1, rounding="split32")
    SGD([whole.bias], lr=0.1).load_state_dict(split.state_dict())
    assert not recwarn.list


def test_low_bits_that_are_dropped_on_loading_are_said():
    model = narrow_model()
    split, nearest = (SGD(model.parameters(), lr=0.1, rounding=rounding) for rounding in ("split32", "nearest"))
    with pytest.warns(UserWarning, match=r"of the checkpoint as 'nearest', and drops the low bits of the weights\.$"):
        nearest.load_state_dict(split.state_dict())
    given = {"weight": torch.randn(5, 9), "bias": torch.randn(5)}
    said = r"^SGD.load_full_precision_state_dict: the low bits of the weights were dropped, .* give rounding='split32'"
    with pytest.warns(UserWarning, match=said):
        nearest.load_full_precision_state_dict(model, given)
    assert torch.equal(model.weight, given["weight"].bfloat16())


def test_weights_that_fit_in_16_bits_load_without_a_word(recwarn):
    model = narrow_model()
    SGD(model.parameters(), lr=0.1).load_full_precision_state_dict(
        model, {k: v.float() for k, v in model.state_dict().items()}
    )
    assert not recwarn.list


@pytest.mark.parametrize("rounding", SPLITS)
def test_only_ties_differ_from_the_weights_when_their_export_is_cast(rounding):
    units = torch.arange(2**16, dtype=torch.int32)  # every low half below 1 and 1.0078
    value = torch.cat([(units + 0x3F800000).view(torch.float32), (units + 0x3F810000).view(torch.float32)])
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2**17).bfloat16())
    optimizer = SGD([model.weight], lr=0.1, rounding=rounding)
    optimizer.load_full_precision_state_dict(model, {"weight": value})
    back = optimizer.full_precision_state_dict(model)["weight"]
    differs = back.bfloat16() != model.weight
    assert differs.sum() == {"split24": 2**8, "split32": 1}[rounding]  # of two neighbors, the even one
    assert (back[differs].view(torch.int32) & 0xFFFF == 0x8000).all()
    optimizer.load_full_precision_state_dict(model, {"weight": back})
    assert torch.equal(optimizer.full_precision_state_dict(model)["weight"], back)


def test_fp16_weights_are_refused_when_they_are_given():
    half, weight = nn.Parameter(torch.ones(3).half()), nn.Parameter(torch.ones(3).bfloat16())
    refusal = r"^AdamW\(rounding='split32'\): a parameter of shape \[3\] is float16; "
    with pytest.raises(ValueError, match=refusal):
        AdamW([half], rounding="split32")
    with pytest.raises(ValueError, match=refusal):
        AdamW([{"params": [half], "rounding": "split32"}])
    optimizer = AdamW([weight], rounding="split32")
    with pytest.raises(ValueError, match=refusal):
        optimizer.add_param_group({"params": half})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": half, "rounding": "kahan"})


@pytest.mark.parametrize("name", ["clip", "average", "state_dtype", "statistics"])
def test_a_group_has_no_stage_of_the_whole_optimizer(name):
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=rf"^AdamW\(params=\[{{'{name}': ...}}\]\): {name} is of the whole optimizer"):
        AdamW([{"params": [weight], name: None}])


# --- through torch's class ---


def with_torch(rounding="split32", state_dtype=torch.float32):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(500).bfloat16())
    optimizer = torch.optim.AdamW([weight], lr=1e-2)
    from_torch_(optimizer, rounding=rounding, state_dtype=state_dtype)
    for _ in range(3):
        step(optimizer, weight)
    return weight, optimizer


def test_a_correction_is_kept_while_nobody_steps():
    weight, optimizer = with_torch()
    before = exported(optimizer, weight)
    to_torch_(optimizer)
    from_torch_(optimizer, rounding="split32")
    assert torch.equal(exported(optimizer, weight), before)


def test_a_correction_is_dropped_after_steps_of_torch():
    weight, optimizer = with_torch()
    to_torch_(optimizer)
    step(optimizer, weight)
    from_torch_(optimizer, rounding="split32")
    assert torch.equal(exported(optimizer, weight), weight.float())


@pytest.mark.parametrize("rounding", ["nearest", *SPLITS])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "int8"])
def test_a_file_of_a_converted_optimizer_goes_through_torch(state_dtype, rounding):
    weight, optimizer = with_torch(rounding, state_dtype)
    saved = optimizer.state_dict()
    plain = torch.optim.AdamW([weight])
    plain.load_state_dict(saved)
    assert plain.state[weight]["exp_avg"].float().abs().max() < 1  # not codes
    step(plain, weight)
    back = torch.optim.AdamW([weight])
    from_torch_(back, rounding=rounding, state_dtype=state_dtype)
    back.load_state_dict(plain.state_dict())
    assert torch.equal(exported(back, weight), weight.float())
    step(back, weight)
    assert weight.isfinite().all()


def test_eight_bits_survive_the_file_of_a_converted_optimizer():
    weight, optimizer = with_torch("split32", "int8")
    twin = nn.Parameter(weight.detach().clone())
    other = torch.optim.AdamW([twin], lr=1e-2)
    from_torch_(other, rounding="split32", state_dtype="int8")
    other.load_state_dict(optimizer.state_dict())
    for name in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale", "correction16"):
        assert torch.equal(other.state[twin][name], optimizer.state[weight][name]), name


# --- exporting and loading ---


def test_an_average_is_exported_in_full():
    weight, optimizer = trained("split32", ScheduleFreeAdamW, fused=None)
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(500).bfloat16().float())
    other = ScheduleFreeAdamW([whole], lr=1e-2)
    other.train()
    for _ in range(3):
        whole.grad = torch.randn(500).bfloat16().float()
        other.step()
    optimizer.eval()
    other.eval()
    assert torch.equal(exported(optimizer, weight), whole.detach())
    with pytest.raises(ValueError, match="the parameters hold an average now"):
        optimizer.load_full_precision_state_dict(model_of(weight), {"weight": torch.ones(500)})
    optimizer.train()
    optimizer.load_full_precision_state_dict(model_of(weight), {"weight": torch.full((500,), 0.1)})
    assert torch.equal(exported(optimizer, weight), torch.full((500,), 0.1))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (torch.ones(500, device="meta"), "is on the meta device"),
        (torch.ones(500).to_sparse(), "must be a dense tensor"),
        (torch.ones(500, dtype=torch.complex64), "must hold numbers like torch.bfloat16"),
        (torch.ones(500, dtype=torch.bool), "must hold numbers like torch.bfloat16"),
    ],
    ids=["meta", "sparse", "complex", "bool"],
)
def test_nothing_is_loaded_unless_all_can_be(bad, said):
    weight, optimizer = trained("split32")
    model = model_of(weight)
    model.other = nn.Parameter(torch.zeros(500).bfloat16())
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=rf"^AdamW.load_full_precision_state_dict\(state_dict=...\): other {said}"):
        optimizer.load_full_precision_state_dict(model, {"weight": torch.ones(500), "other": bad})
    assert torch.equal(weight, before)


def test_tied_weights_stay_one_tensor():
    weight, optimizer = trained("split32")
    model = model_of(weight)
    model.tied = weight
    saved = optimizer.full_precision_state_dict(model)
    assert saved["weight"] is saved["tied"]


def test_a_renamed_entry_is_not_left_in_bf16():
    weight, optimizer = trained("split32")
    model = model_of(weight)
    model.register_state_dict_post_hook(lambda module, saved, prefix, meta: saved.update(w=saved.pop("weight")))
    with pytest.raises(ValueError, match="its state_dict has no 'weight'"):
        optimizer.full_precision_state_dict(model)


@pytest.mark.parametrize(
    "part",
    ["text", torch.zeros(3, dtype=torch.int16), torch.zeros(500), torch.zeros(500, dtype=torch.int64), None],
    ids=["text", "short", "fp32", "int64", "none"],
)
def test_a_damaged_part_is_named(part):
    weight, optimizer = trained("split32")
    optimizer.state[weight]["correction16"] = part
    with pytest.raises(
        ValueError, match=r"the state 'correction16' of a parameter of shape \[500\] must have its shape"
    ):
        exported(optimizer, weight)


def test_a_model_with_other_parameters_is_refused():
    weight, optimizer = trained("split32")
    for model in (model_of(nn.Parameter(weight.detach().clone())), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="it has none of the optimizer's 16-bit parameters"):
            optimizer.full_precision_state_dict(model)


def test_a_copy_of_the_model_and_its_former_optimizer_exports_the_same():
    weight, optimizer = with_torch()
    model, before = model_of(weight), exported(optimizer, weight)
    to_torch_(optimizer)
    copied, copy_of = copy.deepcopy((model, optimizer))
    assert torch.equal(full_precision_state_dict(copy_of, copied)["weight"], before)
    assert torch.equal(full_precision_state_dict(optimizer, model)["weight"], before)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("is_idle", [True, False], ids=["idle", "stepped"])
def test_an_average_that_starts_late_is_of_the_whole_number(is_idle, path):
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(500).bfloat16()) for name in ("first", "late")})
    optimizer = AdamW(model.values(), weight_decay=0.0, rounding="split32", average=EMA(0.9), **PATHS[path])
    for _ in range(3):
        model["first"].grad = torch.ones(500).bfloat16()
        optimizer.step()
    whole = torch.randn(500, generator=torch.Generator().manual_seed(0))
    optimizer.load_full_precision_state_dict(model, {"first": whole.clone(), "late": whole.clone()})
    model["late"].grad = None if is_idle else torch.zeros(500).bfloat16()
    optimizer.step()
    assert torch.equal(optimizer.state[model["late"]]["ema"], whole)
