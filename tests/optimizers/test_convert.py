# SPDX-License-Identifier: Apache-2.0
"""Converts a torch optimizer to one-pass and back during training, unnoticed by those who hold a reference."""

import copy
import inspect

import pytest
import torch
from torch.optim import lr_scheduler

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop
from lightning_optkit.optimizers.convert import (
    from_torch_,
    full_precision_state_dict,
    to_torch_,
    why_not_convertible,
)

SHAPES = [(), (7,), (16, 33)]
NUM_STEPS = 12
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,  # NUM_STEPS on numbers of size 1, each rounded by 6e-8, through a division by a small root
}
RULES = {
    "sgd": (SGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1)),
    "adam": (Adam, torch.optim.Adam, dict(lr=0.05, weight_decay=0.1)),
    "adamw": (AdamW, torch.optim.AdamW, dict(lr=0.05, amsgrad=True)),
    "adafactor": (Adafactor, torch.optim.Adafactor, dict(lr=0.05, weight_decay=0.1)),
    "nadam": (NAdam, torch.optim.NAdam, dict(lr=0.05, weight_decay=0.1)),
    "adagrad": (Adagrad, torch.optim.Adagrad, dict(lr=0.05, lr_decay=0.1)),
    "rmsprop": (RMSprop, torch.optim.RMSprop, dict(lr=0.05, momentum=0.9, centered=True, eps=1e-3)),
    "adadelta": (Adadelta, torch.optim.Adadelta, dict(lr=0.5, weight_decay=0.1)),
    "adamax": (Adamax, torch.optim.Adamax, dict(lr=0.05, weight_decay=0.1)),
    "radam": (RAdam, torch.optim.RAdam, dict(lr=0.05, weight_decay=0.1)),
}


def has_momentum(optimizer):
    return not {"momentum", "betas"}.isdisjoint(optimizer.defaults)


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[3, 7]),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=8),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=NUM_STEPS),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=NUM_STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=0.1, total_steps=NUM_STEPS + 1, cycle_momentum=has_momentum(o)
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=has_momentum(o)
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=5), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
}


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in SHAPES]


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def train(optimizer, params, steps, scheduler=None):
    for step in steps:
        give_gradients(params, step)
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()


def built(rule, dtype=torch.float64, **kwargs):
    _, _torch_class, rule_kwargs = RULES[rule]
    params = parameters(dtype)
    return _torch_class(params, **{**rule_kwargs, **kwargs}), params


def without_params(groups):
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


# --- training continues ---


DTYPES_AND_PLACES = [
    (torch.float32, 4, 8),
    *((torch.float64, there, back) for there, back in [(0, 0), (0, NUM_STEPS), (4, 8), (1, 2)]),
]


@pytest.mark.parametrize("dtype, there, back", DTYPES_AND_PLACES)
@pytest.mark.parametrize("scheduled", SCHEDULERS)
@pytest.mark.parametrize("rule", RULES)
def test_training_continues_under_every_scheduler(rule, scheduled, dtype, there, back):
    """Converted before step `there` and back before step `back`: every warning of torch would be an error here."""
    runs = []
    for is_converted in (False, True):
        optimizer, params = built(rule, dtype)
        scheduler = SCHEDULERS[scheduled](optimizer)
        train(optimizer, params, range(there), scheduler)
        if is_converted:
            from_torch_(optimizer)
            assert type(optimizer) is RULES[rule][0]
        train(optimizer, params, range(there, back), scheduler)
        if is_converted:
            to_torch_(optimizer)
            assert type(optimizer) is RULES[rule][1]
        train(optimizer, params, range(back, NUM_STEPS), scheduler)
        runs.append((params, without_params(optimizer.param_groups), scheduler.get_last_lr()))
    (expected, expected_groups, expected_lr), (params, groups, last_lr) = runs
    torch.testing.assert_close(params, expected, rtol=0, atol=TOLERANCE[dtype])
    assert (groups, last_lr) == (expected_groups, expected_lr)


@pytest.mark.parametrize("rule", RULES)
def test_converting_between_the_step_and_the_schedulers_step_is_no_reason_to_warn(rule):
    optimizer, params = built(rule)
    scheduler = SCHEDULERS["StepLR"](optimizer)
    train(optimizer, params, [0])
    from_torch_(optimizer)
    scheduler.step()
    train(optimizer, params, [1])
    to_torch_(optimizer)
    scheduler.step()


@pytest.mark.parametrize("convert", [lambda o: from_torch_(o), lambda o: (from_torch_(o), to_torch_(o))])
def test_a_scheduler_that_is_stepped_first_still_warns(convert):
    optimizer, _ = built("adamw")
    scheduler = SCHEDULERS["StepLR"](optimizer)
    convert(optimizer)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_a_tensor_lr_stays_the_same_tensor():
    lr = torch.tensor(0.05, dtype=torch.float64)
    optimizer, params = built("adamw", lr=lr)
    expected, expected_params = built("adamw", lr=lr.clone())
    for o, p in ((optimizer, params), (expected, expected_params)):
        scheduler = SCHEDULERS["ExponentialLR"](o)
        if o is optimizer:
            from_torch_(o)
        train(o, p, range(5), scheduler)
    assert optimizer.param_groups[0]["lr"] is lr
    torch.testing.assert_close(params, expected_params, rtol=0, atol=1e-12)


@pytest.mark.parametrize("momenta", [(0.0, 0.9), (0.9, 0.0, 0.9)], ids=str)
def test_a_momentum_that_passes_through_zero(momenta):
    """torch creates a buffer at the first step with momentum, and does not change it while momentum is 0."""
    optimizers, parameter_lists = zip(*(built("sgd", nesterov=False) for _ in range(2)), strict=True)
    from_torch_(optimizers[1])
    for optimizer, params in zip(optimizers, parameter_lists, strict=True):
        for place, momentum in enumerate(momenta):
            optimizer.param_groups[0]["momentum"] = momentum
            train(optimizer, params, range(3 * place, 3 * place + 3))
    torch.testing.assert_close(parameter_lists[1], parameter_lists[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_16_bit_parameters_train_on_after_the_way_back(rule, dtype):
    optimizer, params = built(rule, dtype)
    from_torch_(optimizer)
    train(optimizer, params, range(3))
    to_torch_(optimizer)
    train(optimizer, params, range(3, 6))
    assert all(p.isfinite().all() for p in params)


def test_parameters_with_moments_in_bf16_train_on_after_the_way_back():
    optimizer, params = built("adamw", torch.float32)
    from_torch_(optimizer, state_dtype=torch.bfloat16)
    train(optimizer, params, range(3))
    to_torch_(optimizer)
    train(optimizer, params, range(3, 6))
    assert all(p.isfinite().all() for p in params)


# --- a second conversion starts anew ---


def test_nothing_of_a_conversion_is_left_after_the_way_back():
    optimizer, params = built("adamw")
    before = set(vars(optimizer))
    from_torch_(optimizer, statistics=True)
    optimizer.clip = ClipNorm(1e-3)
    train(optimizer, params, range(3))
    to_torch_(optimizer)
    assert set(vars(optimizer)) - before <= {"_step_supports_amp_scaling"}  # torch sets it for some arguments
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)


def test_a_second_conversion_keeps_no_clip_average_dtype_or_counts_of_the_first():
    optimizer, params = built("adamw", torch.float32)
    from_torch_(optimizer, statistics=True, state_dtype=torch.bfloat16)
    optimizer.clip = ClipNorm(1e-3)
    optimizer.keep_average(EMA(0.9))
    train(optimizer, params, range(3))
    to_torch_(optimizer)
    from_torch_(optimizer)
    assert optimizer.clip is None
    assert optimizer.average is None
    assert optimizer.num_steps == optimizer.num_clipped == 0
    assert not optimizer.record_statistics
    assert optimizer.state_dtype == torch.float32


@pytest.mark.parametrize("rule", RULES)
def test_training_continues_through_two_conversions(rule):
    optimizer, params = built(rule)
    expected, expected_params = built(rule)
    from_torch_(optimizer)
    train(optimizer, params, range(3))
    to_torch_(optimizer)
    train(optimizer, params, range(3, 6))
    from_torch_(optimizer)
    assert (
        optimizer._engine.plan is None
    )  # a plan of before holds addresses of state that is gone: not to be stepped with
    train(optimizer, params, range(6, 9))
    train(expected, expected_params, range(9))
    torch.testing.assert_close(params, expected_params, rtol=0, atol=1e-12)


# --- what its users hold on to ---


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


# --- state dicts ---


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


# --- refused, and nothing changed ---


class Changed(torch.optim.AdamW):
    """A user's own AdamW."""


REFUSED = {
    "subclass": (lambda p: Changed([p]), r"changes torch\.optim\.AdamW"),
    "no rule": (lambda p: torch.optim.Rprop([p]), r"no one-pass rule for torch\.optim\.Rprop"),
    "lbfgs": (lambda p: torch.optim.LBFGS([p]), r"no one-pass rule for torch\.optim\.LBFGS"),
    "differentiable": (lambda p: torch.optim.AdamW([p], differentiable=True), r"differentiable=True"),
    "one-pass": (lambda p: AdamW([p]), r"AdamW is one-pass already"),
}


def attributes(optimizer):
    kept = {key: value for key, value in vars(optimizer).items() if key not in ("state", "param_groups", "_plan")}
    return type(optimizer), kept, [dict(group) for group in optimizer.param_groups]


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_sentence_and_changes_nothing(case, snapshot):
    build, message = REFUSED[case]
    p = torch.ones(3, requires_grad=True)
    optimizer = build(p)
    scheduler = SCHEDULERS["StepLR"](optimizer)
    assert scheduler is not None
    before = attributes(optimizer), snapshot(optimizer)
    assert why_not_convertible(optimizer) is not None
    with pytest.raises(TypeError, match=rf"^from_torch_\(optimizer=<{type(optimizer).__name__}>\): .*{message}.*\.$"):
        from_torch_(optimizer)
    assert (attributes(optimizer), snapshot(optimizer)) == before


@pytest.mark.parametrize("kwargs", [dict(rounding="up"), dict(state_dtype=torch.float16)], ids=str)
def test_a_bad_argument_is_found_before_anything_is_changed(kwargs, snapshot):
    optimizer, params = built("adamw")
    SCHEDULERS["StepLR"](optimizer)
    train(optimizer, params, range(2))
    before = attributes(optimizer), snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"^AdamW\({next(iter(kwargs))}="):
        from_torch_(optimizer, **kwargs)
    assert (attributes(optimizer), snapshot(optimizer)) == before


ACCEPTED_BY_TORCH = {
    "nesterov without momentum": lambda p, q: torch.optim.SGD(
        [dict(params=[p]), dict(params=[q], momentum=0.0)], lr=0.1, momentum=0.9, nesterov=True
    ),
    "tensor eps": lambda p, q: torch.optim.AdamW([p, q], eps=torch.tensor(1e-8)),
}


@pytest.mark.parametrize("case", ACCEPTED_BY_TORCH)
def test_what_torch_accepts_is_converted_or_refused_with_a_reason(case):
    """`why_not_convertible` is what a caller asks first; `from_torch_` must agree with it."""
    params = [torch.ones(2, requires_grad=True) for _ in range(2)]
    optimizer = ACCEPTED_BY_TORCH[case](*params)
    train(optimizer, params, range(2))
    if why_not_convertible(optimizer) is None:
        from_torch_(optimizer)
        train(optimizer, params, range(2))


def test_converting_back_copies_no_state_that_torch_can_use():
    param = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = torch.optim.AdamW([param])
    from_torch_(optimizer)
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = {name: optimizer.state[param][name].data_ptr() for name in ("exp_avg", "exp_avg_sq")}
    to_torch_(optimizer)
    assert {name: optimizer.state[param][name].data_ptr() for name in before} == before


def test_a_torch_optimizer_and_a_copy_are_not_converted_back():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    said = r"^to_torch_\(optimizer=<AdamW>\): it was not made by from_torch_, or it is a copy\.$"
    with pytest.raises(ValueError, match=said):
        to_torch_(optimizer)
    from_torch_(optimizer)
    with pytest.raises(ValueError, match=said):
        to_torch_(copy.deepcopy(optimizer))
    to_torch_(optimizer)
    with pytest.raises(ValueError, match=said):
        to_torch_(optimizer)


@pytest.mark.parametrize("function", [from_torch_, to_torch_, lambda given: full_precision_state_dict(given, None)])
@pytest.mark.parametrize("given", [None, torch.optim.SGD, torch.nn.Linear(1, 1)], ids=["none", "class", "module"])
def test_what_is_no_optimizer_is_refused(function, given):
    with pytest.raises(TypeError, match=r"^(from_torch_|to_torch_|full_precision_state_dict)\(optimizer=.*must be one"):
        function(given)


def test_weights_of_a_model_in_fp32_come_out_as_they_are():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    from_torch_(optimizer)
    assert torch.equal(full_precision_state_dict(optimizer, model)["weight"], model.weight)
