# SPDX-License-Identifier: Apache-2.0
"""State dicts: exchanged with torch.optim, kept in their own dtypes, with the entries of their groups."""

import copy
import io

import pytest
import torch

from lightning_optkit.averaging import EMA
from lightning_optkit.optimizers import SGD, Adafactor, Adam, AdamW
from tests.step.loading_cases import steps, two_groups

RULES = {
    "sgd": (SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True)),
    "plain sgd": (SGD, torch.optim.SGD, dict(lr=0.1, weight_decay=0.1)),
    "adam": (Adam, torch.optim.Adam, dict(lr=0.1, weight_decay=0.1)),
    "adam amsgrad": (Adam, torch.optim.Adam, dict(lr=0.1, amsgrad=True)),
    "adamw": (AdamW, torch.optim.AdamW, dict(lr=0.1)),
    "adamw amsgrad": (AdamW, torch.optim.AdamW, dict(lr=0.1, amsgrad=True)),
    "adafactor": (Adafactor, torch.optim.Adafactor, dict(lr=0.1, d=2.0)),
}


def through_a_file(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


# --- exchanged with torch ---


@pytest.mark.parametrize("direction", ["torch to ours", "ours to torch"])
@pytest.mark.parametrize("rule", RULES)
def test_a_state_dict_continues_in_the_other_package(rule, direction):
    ours_class, _torch_class, kwargs = RULES[rule]
    first_class, second_class = (
        (_torch_class, ours_class) if direction == "torch to ours" else (ours_class, _torch_class)
    )
    expected, expected_params = two_groups(_torch_class, **kwargs)
    steps(expected, expected_params, range(6))

    first, first_params = two_groups(first_class, **kwargs)
    steps(first, first_params, range(3))
    second, params = two_groups(second_class, lr=0.7)
    second.load_state_dict(through_a_file(first.state_dict()))
    for p, q in zip(params, first_params, strict=True):
        p.data.copy_(q.detach())
    steps(second, params, range(3, 6))

    torch.testing.assert_close(params, expected_params, rtol=0, atol=1e-12)
    assert [g["lr"] for g in second.param_groups] == [g["lr"] for g in expected.param_groups]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_momentum_buffer_of_none_counts_as_no_buffer(momentum):
    kwargs = dict(lr=0.1, momentum=momentum, dampening=0.5)
    optimizers = [two_groups(optimizer_class, **kwargs) for optimizer_class in (SGD, torch.optim.SGD)]
    state_dict = optimizers[1][0].state_dict()
    state_dict["state"] = {i: {"momentum_buffer": None} for i in range(3)}
    for optimizer, params in optimizers:
        optimizer.load_state_dict(copy.deepcopy(state_dict))
        steps(optimizer, params, range(3))
    torch.testing.assert_close(optimizers[0][1], optimizers[1][1], rtol=0, atol=1e-12)


def test_step_as_a_plain_number_as_old_torch_saved_it():
    optimizers = [two_groups(optimizer_class, lr=0.1) for optimizer_class in (AdamW, torch.optim.AdamW)]
    source, params = two_groups(torch.optim.AdamW, lr=0.1)
    steps(source, params, range(3))
    state_dict = source.state_dict()
    for state in state_dict["state"].values():
        state["step"] = float(state["step"])
    for optimizer, params in optimizers:
        optimizer.load_state_dict(copy.deepcopy(state_dict))
        steps(optimizer, params, range(3))
    torch.testing.assert_close(optimizers[0][1], optimizers[1][1], rtol=0, atol=1e-12)


def test_torch_ignores_what_only_our_stages_keep():
    ours, params = two_groups(AdamW, average=EMA(0.9), rounding="kahan", l1=0.1, statistics=True)
    steps(ours, params, range(2))
    theirs, params = two_groups(torch.optim.AdamW)
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    steps(theirs, params, range(2))
    assert theirs.state[params[0]]["step"] == 4


def test_keeps_the_stages_of_this_optimizer_when_the_state_is_of_torch():
    theirs, params = two_groups(torch.optim.AdamW, lr=0.1)
    steps(theirs, params, range(2))
    ours, params = two_groups(AdamW, l1=0.25, cautious=True, rounding="stochastic", average=EMA(0.9))
    ours.load_state_dict(theirs.state_dict())
    group = ours.param_groups[0]
    assert (group["l1"], group["cautious"], group["rounding"], group["average_decay"]) == (
        0.25,
        True,
        "stochastic",
        0.9,
    )
    steps(ours, params, [2])
    assert torch.equal(ours.state[params[0]]["ema"], params[0].detach())  # its first update is a copy


# --- our own ---


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan", "split24", "split32"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_equals_the_uninterrupted_run_bit_by_bit(dtype, rounding, state_dtype, fused, snapshot):
    if dtype == torch.float16 and rounding.startswith("split"):
        pytest.skip("refused")
    kwargs = dict(lr=0.1, rounding=rounding, state_dtype=state_dtype, average=EMA(0.9, start=2, every=2), fused=fused)
    whole, whole_params = two_groups(AdamW, dtype, **kwargs)
    steps(whole, whole_params, range(6))

    first, first_params = two_groups(AdamW, dtype, **kwargs)
    steps(first, first_params, range(3))
    second, params = two_groups(AdamW, dtype, **kwargs)
    for p, q in zip(params, first_params, strict=True):
        p.data.copy_(q.detach())
    second.load_state_dict(through_a_file(first.state_dict()))
    steps(second, params, range(3, 6))

    ours, expected = snapshot(second), snapshot(whole)
    assert (ours["params"], ours["state_dict"]) == (expected["params"], expected["state_dict"])


def test_fp32_moments_of_a_bf16_parameter_stay_fp32():
    first, params = two_groups(AdamW, torch.bfloat16, average=EMA(0.9))
    steps(first, params, range(3))
    second, loaded = two_groups(AdamW, torch.bfloat16, average=EMA(0.9))
    second.load_state_dict(through_a_file(first.state_dict()))
    for p, q in zip(params[:2], loaded[:2], strict=True):
        for name in ("exp_avg", "exp_avg_sq", "ema", "step"):
            assert second.state[q][name].dtype == torch.float32
            assert torch.equal(second.state[q][name], first.state[p][name])


def test_moments_are_put_into_the_state_dtype_of_this_optimizer():
    first, params = two_groups(AdamW, torch.float32)
    steps(first, params, range(2))
    second, loaded = two_groups(AdamW, torch.float32, state_dtype=torch.bfloat16)
    second.load_state_dict(first.state_dict())
    assert second.state[loaded[0]]["exp_avg"].dtype == torch.bfloat16
    assert torch.equal(second.state[loaded[0]]["exp_avg"], first.state[params[0]]["exp_avg"].bfloat16())


def test_the_loaded_state_does_not_share_memory_with_the_state_dict(snapshot):
    first, params = two_groups(AdamW, torch.float32)
    steps(first, params, range(2))
    second, loaded = two_groups(AdamW, torch.float32)
    second.load_state_dict(first.state_dict())
    before = snapshot(first)
    steps(second, loaded, range(2))
    assert snapshot(first) == before


def test_moments_of_a_transposed_parameter_keep_their_places():
    def transposed(optimizer_class):
        p = torch.arange(6.0, dtype=torch.float64).view(2, 3).t().requires_grad_()
        return optimizer_class([p], lr=0.1), [p, p]  # `steps` leaves the last one alone

    optimizers = [transposed(AdamW), transposed(torch.optim.AdamW)]
    source = torch.arange(6.0, dtype=torch.float64).view(2, 3).t().contiguous().requires_grad_()
    source.grad = torch.randn(3, 2, dtype=torch.float64)
    saved = torch.optim.AdamW([source], lr=0.1)
    saved.step()
    for optimizer, params in optimizers:
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
        steps(optimizer, params, range(2))
    torch.testing.assert_close(optimizers[0][1][0], optimizers[1][1][0], rtol=0, atol=1e-12)


def test_parameters_without_saved_state_start_anew():
    first, _ = two_groups(AdamW)
    second, params = two_groups(AdamW)
    steps(second, params, range(2))
    second.load_state_dict(first.state_dict())
    assert not second.state.get(params[0])


def test_the_hooks_of_torch_see_and_may_change_the_state_dict():
    first, params = two_groups(AdamW)
    steps(first, params, range(2))
    second, loaded = two_groups(AdamW)
    calls = []

    def filled_with_ones(optimizer, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0]["exp_avg"].fill_(1.0)
        return state_dict

    def after(optimizer):
        calls.append(optimizer.state[loaded[0]]["exp_avg"].clone())

    second.register_load_state_dict_pre_hook(filled_with_ones)
    second.register_load_state_dict_post_hook(after)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.state[loaded[0]]["exp_avg"], torch.ones(3, dtype=torch.float64))
    assert torch.equal(calls[0], torch.ones(3, dtype=torch.float64))


# --- entries of groups ---


@pytest.mark.parametrize(
    "entry", ["initial_lr", "max_lr", "min_lr", "swa_lr", "lr_scale", "name", "layer", "initial_lr_factor"]
)
@pytest.mark.parametrize("source", [AdamW, torch.optim.AdamW], ids=["ours", "torch"])
def test_an_entry_that_the_loaded_group_lacks_goes_as_in_torch(entry, source):
    saved = two_groups(source, lr=0.5)[0].state_dict()
    kept = []
    for optimizer_class in (AdamW, torch.optim.AdamW):
        optimizer, _ = two_groups(optimizer_class)
        optimizer.param_groups[1][entry] = 1e-8
        optimizer.load_state_dict(copy.deepcopy(saved))
        kept.append([entry in group for group in optimizer.param_groups])
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert kept == [[False, False]] * 2


def test_an_entry_that_only_the_loaded_group_has_comes_as_in_torch():
    saved = two_groups(AdamW)[0].state_dict()
    saved["param_groups"][1] |= dict(initial_lr=0.3, name="head", param_names=["a", "b"])
    for optimizer_class in (AdamW, torch.optim.AdamW):
        optimizer, _ = two_groups(optimizer_class)
        optimizer.load_state_dict(copy.deepcopy(saved))
        group = optimizer.param_groups[1]
        assert (group["initial_lr"], group["name"], group["param_names"]) == (0.3, "head", ["a", "b"])


def test_names_of_parameters_stay_where_the_loaded_groups_have_none():
    saved = AdamW([torch.ones(2, requires_grad=True)]).state_dict()
    optimizer = AdamW([("weight", torch.ones(2, requires_grad=True))])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == ["weight"]
