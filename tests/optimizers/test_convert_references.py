# SPDX-License-Identifier: Apache-2.0
"""What holds a reference to a converted optimizer finds it as before: hooks, classes, closures, groups."""

import inspect

import pytest
import torch

from lightning_optkit.optimizers.convert import from_torch_, to_torch_
from tests.optimizers.convert_cases import RULES, built, give_gradients, train, without_params


@pytest.mark.parametrize("rule", RULES)
def test_step_hooks_fire_once_per_step_all_along(rule):
    optimizer, params = built(rule)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(optimizer, params, range(2))
    from_torch_(optimizer)
    train(optimizer, params, range(2))
    to_torch_(optimizer)
    train(optimizer, params, range(2))
    assert calls == ["before", "after"] * 6


ALL = ["SGD", "Adagrad", "RMSprop", "Adadelta", "Adafactor", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam"]
TORCHS = [
    name
    for name in dir(torch.optim)
    if isinstance(getattr(torch.optim, name), type) and issubclass(getattr(torch.optim, name), torch.optim.Optimizer)
]


@pytest.mark.parametrize("rule", ALL)
def test_isinstance_gives_the_answers_of_before(rule):
    optimizer = getattr(torch.optim, rule)([torch.ones(2, 2, requires_grad=True)])
    answers = {name: isinstance(optimizer, getattr(torch.optim, name)) for name in TORCHS}
    from_torch_(optimizer)
    assert {name: isinstance(optimizer, getattr(torch.optim, name)) for name in TORCHS} == answers
    assert answers[rule]
    to_torch_(optimizer)
    assert type(optimizer) is getattr(torch.optim, rule)


@pytest.mark.parametrize("rule", ALL)
def test_hooks_of_the_state_dict_and_of_the_step_survive(rule):
    optimizer = getattr(torch.optim, rule)([torch.ones(2, 2, requires_grad=True)])
    kinds = [
        "step_pre",
        "step_post",
        "state_dict_pre",
        "state_dict_post",
        "load_state_dict_pre",
        "load_state_dict_post",
    ]
    calls = []
    for kind in kinds:
        getattr(optimizer, f"register_{kind}_hook")(lambda *_, kind=kind: calls.append(kind))
    for convert in (from_torch_, to_torch_, from_torch_):
        calls.clear()
        convert(optimizer)
        calls.clear()  # a conversion reads the state dict itself
        give_gradients(optimizer.param_groups[0]["params"], 0)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        assert calls == kinds


@pytest.mark.parametrize("rule", ALL)
def test_what_torch_creates_ahead_of_a_step_is_gone_on_with(rule, frozen):
    """Some tools call `_init_group` of torch's rules to create state before loading."""
    finished = []
    for is_created in (False, True):
        params = [torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)]
        optimizer = getattr(torch.optim, rule)(params)
        from_torch_(optimizer)
        if is_created:
            give_gradients(params, 0)
            lists = len(inspect.signature(getattr(torch.optim, rule)._init_group).parameters) - 2
            optimizer._init_group(optimizer.param_groups[0], *([] for _ in range(lists)))
        train(optimizer, params, range(3))
        finished.append((frozen(params), frozen(optimizer.state[params[0]])))
    assert finished[0] == finished[1]


@pytest.mark.parametrize("rule", RULES)
def test_a_closure_is_called_with_gradients_enabled(rule):
    optimizer, params = built(rule)
    from_torch_(optimizer)

    def closure():
        assert torch.is_grad_enabled()
        give_gradients(params, 0)
        return 3.0

    with torch.no_grad():
        assert optimizer.step(closure) == 3.0


@pytest.mark.parametrize("rule", RULES)
def test_parameter_names_and_own_entries_of_groups_survive(rule):
    _, _torch_class, kwargs = RULES[rule]
    p, q = (torch.ones(2, requires_grad=True) for _ in range(2))
    groups = [dict(params=[("first", p)], lr=0.3, layer=1, initial_lr=0.5), dict(params=[("second", q)], layer=2)]
    optimizer = _torch_class(groups, **kwargs)
    expected = [set(group) for group in optimizer.param_groups]
    dicts = list(optimizer.param_groups)

    from_torch_(optimizer)
    train(optimizer, [p, q], range(2))
    assert [group["param_names"] for group in optimizer.param_groups] == [["first"], ["second"]]
    assert [group["layer"] for group in optimizer.param_groups] == [1, 2]

    to_torch_(optimizer)
    assert [group["param_names"] for group in optimizer.param_groups] == [["first"], ["second"]]
    assert [(group["layer"], group["lr"]) for group in optimizer.param_groups] == [(1, 0.3), (2, kwargs["lr"])]
    assert optimizer.param_groups[0]["initial_lr"] == 0.5
    assert [set(group) for group in optimizer.param_groups] == expected
    assert all(group is before for group, before in zip(optimizer.param_groups, dicts, strict=True))


@pytest.mark.parametrize("kwargs", [dict(fused=True), dict(foreach=True), dict(fused=False)], ids=str)
def test_comes_back_with_the_implementation_that_was_asked_for(kwargs):
    optimizer, params = built("adamw", torch.float32, **kwargs)
    before = without_params(optimizer.param_groups)
    supports_scaling = getattr(optimizer, "_step_supports_amp_scaling", False)
    from_torch_(optimizer)
    train(optimizer, params, range(2))
    to_torch_(optimizer)
    assert without_params(optimizer.param_groups) == before
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == supports_scaling
