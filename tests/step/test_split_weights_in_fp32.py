# SPDX-License-Identifier: Apache-2.0
"""Split weights go out to fp32 and come in from it: exactly, or refused."""

import copy

import pytest
import torch
from torch import nn

from lightning_optkit.optimizers import SGD, AdamW
from tests.step.split_weights_cases import ROUNDINGS, joined


def test_the_weights_in_fp32_go_out_and_in_exactly():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(9, 5), nn.BatchNorm1d(5)).to(torch.bfloat16) for _ in range(2)]
    ones = [AdamW(model.parameters(), lr=1e-4, rounding="split32") for model in models]
    for _ in range(4):
        models[0](torch.randn(8, 9).bfloat16()).square().sum().backward()
        ones[0].step()
        ones[0].zero_grad()
    exported = ones[0].full_precision_state_dict(models[0])
    assert exported["0.weight"].dtype == torch.float32
    assert torch.equal(exported["0.weight"], joined(ones[0], models[0][0].weight))
    assert exported["1.running_mean"].dtype == torch.bfloat16
    ones[1].load_full_precision_state_dict(models[1], exported)
    assert torch.equal(models[1][0].weight, models[0][0].weight)
    again = ones[1].full_precision_state_dict(models[1])
    assert all(torch.equal(again[name], value) for name, value in exported.items())
    plain = nn.Sequential(nn.Linear(9, 5), nn.BatchNorm1d(5))
    plain.load_state_dict(exported)  # torch's own module takes them
    for model, optimizer in zip(models, ones, strict=True):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.param_groups[0]["weight_decay"] = 0.0
    before = joined(ones[1], models[1][0].weight)
    models[1][0].weight.grad = torch.zeros_like(models[1][0].weight)
    ones[1].step()
    assert torch.equal(joined(ones[1], models[1][0].weight), before)


def test_refuses_weights_in_fp32_of_another_model():
    model = nn.Linear(3, 2).bfloat16()
    optimizer = SGD(model.parameters(), lr=0.1, rounding="split24")
    before = copy.deepcopy(model.state_dict())
    owner = r"^SGD.load_full_precision_state_dict\(state_dict=...\): "
    for weights, words in (
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, r"weight must have shape \[2, 3\], got shape \[2, 4\]"),
        ({"weight": 5, "bias": torch.zeros(2)}, r"weight must have shape \[2, 3\], got a int"),
        ({"weight": torch.zeros(2, 3)}, "bias is missing"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "other": 1}, "other is not in the model"),
    ):
        with pytest.raises(ValueError, match=owner + words):
            optimizer.load_full_precision_state_dict(model, weights)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    assert not optimizer.state


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_weights_in_fp32_replace_what_was_left_of_those_before(rounding):
    model = nn.Linear(9, 5).bfloat16()
    optimizer = SGD(model.parameters(), lr=0.1, rounding=rounding)
    model(torch.randn(3, 9).bfloat16()).sum().backward()
    optimizer.step()
    given = {"weight": torch.randn(5, 9), "bias": torch.randn(5)}
    optimizer.load_full_precision_state_dict(model, given)
    found = optimizer.full_precision_state_dict(model)
    bits = {"kahan": 2**-16, "split24": 2**-16, "split32": 0}[rounding]
    for name, value in given.items():
        torch.testing.assert_close(found[name], value, rtol=bits, atol=0)


def test_weights_in_fp32_are_not_loaded_into_a_copy():
    model = torch.nn.Linear(3, 2).bfloat16()
    optimizer = AdamW(model.parameters(), rounding="split32")
    copied = copy.deepcopy(model)
    with pytest.raises(
        ValueError, match=r"load_full_precision_state_dict\(model=<Linear>\): it has none of the optimizer's"
    ):
        optimizer.load_full_precision_state_dict(copied, optimizer.full_precision_state_dict(model))
