# SPDX-License-Identifier: Apache-2.0
"""The rules that torch has too: the same arguments, results, state dicts and refusals, for any user input."""

import copy
import inspect
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_optkit import optimizers as ours
from lightning_optkit.averaging import SWA

NAMES = ["SGD", "Adagrad", "RMSprop", "Adadelta", "Adafactor", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam"]
SHAPES = [(), (1,), (7,), (5, 9), (2, 3, 4)]  # scalar, one element, odd tail, matrix, more dimensions
# A large step counts against the error, which grows with every step; 50 of them.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
RULES = pytest.mark.parametrize("name", NAMES)


def classes(name):
    return getattr(ours, name), getattr(torch.optim, name)


def arguments(name):
    """Names of torch's arguments, without the parameters."""
    return [argument for argument in inspect.signature(classes(name)[1]).parameters if argument != "params"]


@RULES
def test_takes_torchs_arguments_with_their_kinds_and_defaults(name):
    mine, torchs = (inspect.signature(cls).parameters for cls in classes(name))
    shared = [argument for argument in mine if argument in torchs]
    assert shared == list(torchs)
    for argument in shared:
        assert (mine[argument].kind, mine[argument].default) == (torchs[argument].kind, torchs[argument].default)
    added = [mine[argument] for argument in mine if argument not in torchs]
    assert {argument.kind for argument in added} == {inspect.Parameter.KEYWORD_ONLY}


# --- the same answers to isinstance, and nothing of torch's rule behind them ---


def torchs_classes():
    found = (getattr(torch.optim, name) for name in dir(torch.optim))
    return [cls for cls in found if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)]


def test_every_rule_that_says_which_of_torchs_it_is_is_in_the_table():
    rules = [getattr(ours, name) for name in ours.__all__]
    assert {rule.__name__ for rule in rules if getattr(rule, "_torch_class", None)} == set(NAMES)


@RULES
def test_it_is_what_torchs_class_is_and_nothing_else_of_torchs(name):
    mine, torchs = classes(name)
    assert mine._torch_class is torchs
    assert [issubclass(mine, cls) for cls in torchs_classes()] == [issubclass(torchs, cls) for cls in torchs_classes()]


@RULES
def test_a_rule_that_torch_does_not_have_is_none_of_torchs(name):
    others = {name for name in ours.__all__ if getattr(getattr(ours, name), "_torch_class", True) is None}
    assert {"Lion", "ScheduleFreeAdamW"} <= others
    assert not any(issubclass(getattr(ours, other), classes(name)[1]) for other in others)


@RULES
def test_nothing_of_torchs_rule_is_run(name, monkeypatch, frozen):
    mine, torchs = classes(name)
    for cls in set(torchs.__mro__) - set(torch.optim.Optimizer.__mro__):
        for method in ("__init__", "__setstate__", "_init_group", "step"):
            if method in vars(cls):
                monkeypatch.setattr(cls, method, lambda *args, **kwargs: pytest.fail("torch's rule was run"))
    params = [torch.ones(3, 4, requires_grad=True)]
    optimizer = mine(params)
    optimizer.add_param_group({"params": [torch.ones(2, 2, requires_grad=True)]})

    def step(optimizer):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.linspace(-1, 1, param.numel()).view_as(param)
        optimizer.step()
        return frozen([param for group in optimizer.param_groups for param in group["params"]])

    step(optimizer)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    saved = copy.deepcopy(optimizer.state_dict())
    expected = step(optimizer)
    assert [step(copied) for copied in copies] == [expected, expected]
    copies[0].load_state_dict(saved)
    assert optimizer.__repr__().startswith(f"{name} (")


# --- the same numbers ---

betas = st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.5, 0.9, 0.999]))
eps = st.sampled_from([1e-8, 1e-4, 0.1])
decays = st.sampled_from([0.0, 0.01, 0.2])
DRAWN = {
    "SGD": dict(
        momentum=st.sampled_from([0.0, 0.5, 0.9]), dampening=st.sampled_from([0.0, 0.3]), nesterov=st.booleans()
    ),
    "Adagrad": dict(
        lr_decay=st.sampled_from([0.0, 0.1]), initial_accumulator_value=st.sampled_from([0.0, 0.5]), eps=eps
    ),
    "RMSprop": dict(
        alpha=st.sampled_from([0.5, 0.9, 0.99]), eps=st.sampled_from([1e-3, 0.1]),
        momentum=st.sampled_from([0.0, 0.9]), centered=st.booleans(),
    ),
    "Adadelta": dict(rho=st.sampled_from([0.0, 0.5, 0.9]), eps=st.sampled_from([1e-6, 1e-2])),
    "Adafactor": dict(
        beta2_decay=st.sampled_from([-0.8, -0.3]), eps=st.sampled_from([(None, 1e-3), (1e-3, 0.1)]),
        d=st.sampled_from([1.0, 2.0]),
    ),
    "Adam": dict(betas=betas, eps=eps, amsgrad=st.booleans(), decoupled_weight_decay=st.booleans()),
    "AdamW": dict(betas=betas, eps=eps, amsgrad=st.booleans()),
    "Adamax": dict(betas=betas, eps=eps),
    "Muon": dict(
        momentum=st.sampled_from([0.0, 0.95]), nesterov=st.booleans(), ns_steps=st.sampled_from([0, 2]),
        adjust_lr_fn=st.sampled_from([None, "original", "match_rms_adamw"]),
    ),
    "NAdam": dict(
        betas=betas, eps=eps, momentum_decay=st.sampled_from([0.0, 4e-3]), decoupled_weight_decay=st.booleans()
    ),
    "RAdam": dict(betas=betas, eps=eps, decoupled_weight_decay=st.booleans()),
}  # fmt: skip


@st.composite
def settings_of(draw, name):
    """Arguments for both packages; a flag that chooses among torch's implementations is part of them."""
    drawn = {argument: draw(values) for argument, values in DRAWN[name].items()}
    drawn |= dict(lr=draw(st.sampled_from([0.0, 1e-3, 0.02])), weight_decay=draw(decays))
    if draw(st.booleans()):
        drawn["lr"] = torch.tensor(drawn["lr"], dtype=torch.float64)
    if drawn.get("nesterov") and name == "SGD":
        drawn |= dict(dampening=0.0, momentum=max(drawn["momentum"], 0.5))
    for flag in ("maximize", "foreach", "fused"):
        if flag in arguments(name) and draw(st.booleans()):
            drawn[flag] = True
    if drawn.get("fused") or isinstance(drawn["lr"], torch.Tensor):
        drawn.pop("foreach", None)  # which torch refuses
    return drawn


def parameters(name, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 9), (4, 4), (9, 2)] if name == "Muon" else SHAPES
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [[value.clone().requires_grad_() for value in values] for _ in range(2)]


def both(name, dtype, drawn):
    """The two optimizers, and their parameters."""
    params = parameters(name, dtype)
    return [cls(own, **copy.deepcopy(drawn)) for cls, own in zip(classes(name), params, strict=True)], params


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@RULES
@settings(max_examples=settings.default.max_examples // 4)  # for each rule
@given(data=st.data())
def test_follows_torch_over_50_steps_of_any_settings(name, dtype, train, data):
    optimizers, (mine, theirs) = both(name, dtype, data.draw(settings_of(name)))
    train(optimizers, [mine, theirs], steps=50)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE[dtype])


@RULES
@settings(max_examples=settings.default.max_examples // 4)  # for each rule
@given(data=st.data(), to_torch=st.booleans())
def test_a_state_dict_of_any_settings_continues_in_the_other_package(name, train, data, to_torch):
    optimizers, (mine, theirs) = both(name, torch.float64, data.draw(settings_of(name)))
    train(optimizers, [mine, theirs], steps=4)
    source, target = optimizers if to_torch else optimizers[::-1]
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    train(optimizers, [mine, theirs], steps=4, seed=2)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("beta1", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adamax", "NAdam", "RAdam"])
def test_a_first_moment_that_forgets_fast_keeps_small_gradients_after_large_ones(name, beta1, fused, dtype):
    found = []
    for cls, path in zip(classes(name), [{"fused": fused}, {}], strict=True):
        p = torch.zeros(9, dtype=dtype, requires_grad=True)
        optimizer = cls(
            [p], lr=0.1, betas=(beta1, 0.5), **(path if "fused" in inspect.signature(cls).parameters else {})
        )
        for gradient in (1e8, 1.2345e-5, 1.5):
            p.grad = torch.full_like(p, gradient)
            optimizer.step()
        found.append(optimizer.state[p]["exp_avg"])
    torch.testing.assert_close(*found, rtol=4e-7 if dtype == torch.float32 else 1e-14, atol=0)


# --- the same refusals ---

NAN = float("nan")
BAD_NUMBERS = [-1.0, NAN, "0.1", None, torch.tensor(-1.0)]
BAD_PAIRS = [
    (-0.1, 0.9),
    (0.9, -0.1),
    (1.0, 0.9),
    (0.9, 1.0),
    (NAN, 0.9),
    (0.9, NAN),
    (0.9, None),
    ("0.1", "0.2"),
    0.9,
    None,
]
FLAGS = ["foreach", "maximize", "capturable", "differentiable", "fused", "nesterov", "amsgrad", "centered"]
TOGETHER = [
    *({first: True, second: True} for first, second in itertools.combinations(FLAGS, 2)),
    *({"lr": torch.tensor(0.1), flag: True} for flag in FLAGS),
    {"lr": torch.tensor([0.1, 0.2])},
    {"lr": torch.tensor([0.1])},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": True},
    {"betas": (torch.tensor(0.9), 0.99)},
    {"adjust_lr_fn": "other"},
    {"ns_steps": 100},
    {"ns_coefficients": (1.0, 2.0)},
    {"eps": (None, -1.0)},
    {"eps": (-1.0, 1e-3)},
]


def bad_arguments(name):
    """What torch may refuse: each argument by itself, and some together."""
    cases = []
    for argument in arguments(name):
        default = inspect.signature(classes(name)[1]).parameters[argument].default
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        values = BAD_NUMBERS if is_number else BAD_PAIRS if isinstance(default, tuple) and len(default) == 2 else []
        cases += [{argument: value} for value in values]
    return [*cases, *(case for case in TOGETHER if set(case) <= set(arguments(name)))]


@RULES
def test_refuses_what_torch_refuses_by_the_same_exception(name):
    mine, torchs = classes(name)
    num_refused = 0
    for case in bad_arguments(name):
        try:
            torchs([torch.ones(2, 2, requires_grad=True)], **case)
        except Exception as refusal:
            num_refused += 1
            with pytest.raises(type(refusal)):
                mine([torch.ones(2, 2, requires_grad=True)], **case)
                pytest.fail(f"takes {case}, which torch refuses: {refusal!r}")
    assert num_refused > 8


@RULES
@pytest.mark.parametrize(
    "params",
    [[], torch.ones(2, requires_grad=True), [torch.ones(2, requires_grad=True) * 2], [1.0], ["weight"]],
    ids=["none", "a tensor", "no leaf", "a number", "a name"],
)
def test_refuses_parameters_that_torch_refuses_by_the_same_exception(name, params):
    mine, torchs = classes(name)
    with pytest.raises((TypeError, ValueError)) as refusal:
        torchs(params)
    with pytest.raises(refusal.type):
        mine(params)


DOUBLE = {  # by what could have been narrowed
    "SGD": dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adagrad": dict(lr=0.1, initial_accumulator_value=0.1, lr_decay=0.01),
    "RMSprop": dict(lr=0.01, centered=True, momentum=0.9),
    "Adadelta": dict(lr=0.7, rho=0.93),
    "Adafactor": dict(lr=0.07),
    "Adam": dict(lr=0.01, amsgrad=True, weight_decay=0.1),
    "AdamW": dict(lr=0.01),
    "Adamax": dict(lr=0.01),
    "NAdam": dict(lr=0.01, momentum_decay=0.003),
    "RAdam": dict(lr=0.01),
}


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("name", DOUBLE)
def test_double_precision_is_double_precision_for_200_steps(name, dtype, fused):
    if name == "Adafactor" and (dtype.is_complex or fused is False):
        pytest.skip("real parameters only, and no argument for the path")
    mine, torchs = classes(name)
    torch.manual_seed(0)
    values = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    p, q = ([value.clone().requires_grad_() for value in values] for _ in range(2))
    path = {} if name == "Adafactor" else dict(fused=fused)
    optimizers = [mine(p, average=SWA(1), **DOUBLE[name], **path), torchs(q, **DOUBLE[name])]
    mean = [torch.zeros_like(value) for value in values]
    for step in range(1, 201):
        for a, b in zip(p, q, strict=True):
            a.grad = torch.randn(a.shape, dtype=dtype) + 0.3
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for average, b in zip(mean, q, strict=True):
            average += (b.detach() - average) / step
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    held = [optimizers[0].state[each]["swa"] for each in p]
    torch.testing.assert_close(held, mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.complex64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [0.1, 1e-30, 1 / 3])
def test_state_that_starts_from_a_number_starts_from_torchs(value, dtype, fused):
    sums = []
    for cls, kwargs in ((ours.Adagrad, dict(fused=fused, state_dtype=torch.float32)), (torch.optim.Adagrad, {})):
        p = torch.ones(5, dtype=dtype, requires_grad=True)
        optimizer = cls([p], lr=0.1, initial_accumulator_value=value, **kwargs)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        sums.append(optimizer.state[p]["sum"].to(torch.promote_types(dtype, torch.float32)))
    tolerance = 0 if dtype != torch.bfloat16 else 2**-8  # torch's is in bf16
    torch.testing.assert_close(*sums, rtol=tolerance, atol=0)
