# SPDX-License-Identifier: Apache-2.0
"""What cannot be converted, or converted back, is refused in one sentence, and nothing changes."""

import copy

import pytest
import torch

from lightning_optkit.optimizers import AdamW
from lightning_optkit.optimizers.convert import from_torch_, full_precision_state_dict, to_torch_, why_not_convertible
from tests.optimizers.convert_cases import SCHEDULERS, built, train


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
