# SPDX-License-Identifier: Apache-2.0
"""State dicts of a converted optimizer are those of torch's, before, during and after."""

import copy

import pytest
import torch

from lightning_optkit.optimizers import SGD
from lightning_optkit.optimizers.convert import from_torch_, full_precision_state_dict, to_torch_
from tests.optimizers.convert_cases import RULES, built, train


@pytest.mark.parametrize("rule", RULES)
def test_the_state_dict_is_that_of_the_untouched_run_before_and_after(rule):
    optimizer, params = built(rule)
    expected, expected_params = built(rule)
    train(optimizer, params, range(3))
    train(expected, expected_params, range(3))
    from_torch_(optimizer)
    check_state(optimizer, expected)
    for o, p in ((optimizer, params), (expected, expected_params)):
        train(o, p, range(3, 6))
    check_state(optimizer, expected)
    to_torch_(optimizer)
    check_state(optimizer, expected)
    assert optimizer.state_dict()["param_groups"] == expected.state_dict()["param_groups"]
    assert optimizer.defaults == expected.defaults


COUNTS = {"step", "momentum_step"}  # torch's SGD counts no steps


def check_state(optimizer, expected):
    ours, theirs = optimizer.state_dict(), expected.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        assert ours["state"][key].keys() - COUNTS == state.keys() - COUNTS
        for name, value in state.items():
            torch.testing.assert_close(ours["state"][key][name], value, rtol=0, atol=1e-12, msg=name)
    for group, torch_group in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert {name: group[name] for name in torch_group} == torch_group


@pytest.mark.parametrize("rule", RULES)
def test_a_state_dict_of_the_converted_optimizer_loads_into_torchs(rule):
    optimizer, params = built(rule)
    from_torch_(optimizer)
    train(optimizer, params, range(3))
    resumed, resumed_params = built(rule, lr=0.7)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(resumed_params, params, strict=True):
        p.data.copy_(q.detach())
    for o, p in ((optimizer, params), (resumed, resumed_params)):
        train(o, p, range(3, 6))
    # NAdam keeps a product of fp32, which each rounds in its own way.
    torch.testing.assert_close(resumed_params, params, rtol=0, atol=1e-10)


def test_loading_a_state_dict_of_torch_does_not_leave_the_compiled_path():
    """`fused=False` chose among torch's implementations; converted, there is one."""
    optimizer, params = built("adamw", fused=False)
    train(optimizer, params, range(2))
    state_dict = copy.deepcopy(optimizer.state_dict())
    from_torch_(optimizer)
    path = optimizer.explain().groups[0].path
    optimizer.load_state_dict(state_dict)
    assert optimizer.explain().groups[0].path == path


def test_converting_back_copies_no_state_that_torch_can_use():
    param = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = torch.optim.AdamW([param])
    from_torch_(optimizer)
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = {name: optimizer.state[param][name].data_ptr() for name in ("exp_avg", "exp_avg_sq")}
    to_torch_(optimizer)
    assert {name: optimizer.state[param][name].data_ptr() for name in before} == before


def test_weights_of_a_model_in_fp32_come_out_as_they_are():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    from_torch_(optimizer)
    assert torch.equal(full_precision_state_dict(optimizer, model)["weight"], model.weight)


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, SGD])
def test_a_model_without_its_parameters_is_refused(optimizer_class):
    model = torch.nn.Linear(3, 2)
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    said = r"full_precision_state_dict\(model=<Linear>\): it has none of the optimizer's parameters; give the model"
    with pytest.raises(ValueError, match=said):
        full_precision_state_dict(optimizer, copy.deepcopy(model))
    whole = torch.nn.Sequential(model, torch.nn.Linear(2, 2))  # of which the optimizer has a part
    assert torch.equal(full_precision_state_dict(optimizer, whole)["0.weight"], model.weight)
