# SPDX-License-Identifier: Apache-2.0
"""The elementwise rules that torch has too, over every combination of arguments a user can give."""

import copy
import itertools
from dataclasses import dataclass

import pytest
import torch

from lightning_optkit import optimizers
from lightning_optkit._native import extension

SHAPES = [(), (1,), (7,), (16, 33)]  # scalar, one element, odd tail, matrix
BOTH = (False, True)
BETAS = dict(betas=((0.9, 0.999), (0.5, 0.9)))


@dataclass(frozen=True)
class Rule:
    """`rounding` bounds the error in float32 after `steps` steps; a number of size 1 is rounded by up to 6e-8 in each,
    mostly to either side. `path_rounding` is that of the compiled step against plain PyTorch after 10.
    """

    values: dict  # each argument's
    bad: list  # arguments that torch refuses
    rounding: float
    path_rounding: float
    steps: int = 50
    lr: float = 1e-2

    def combinations(self):
        rows = [dict(zip(self.values, row, strict=True)) for row in itertools.product(*self.values.values())]
        return [row for row in rows if not row.get("nesterov") or (row["momentum"] > 0 and row["dampening"] == 0)]


RULES = {
    "SGD": Rule(
        dict(
            momentum=(0.0, 0.5, 0.9), dampening=(0.0, 0.3, 1.0), nesterov=BOTH, weight_decay=(0.0, 0.1), maximize=BOTH
        ),
        [
            dict(lr=-1.0), dict(lr="0.1"), dict(lr=torch.ones(2)), dict(momentum=-0.1), dict(weight_decay=-0.1),
            dict(nesterov=True), dict(nesterov=True, momentum=0.9, dampening=0.1), dict(fused=True, foreach=True),
        ],
        rounding=1e-5,  # on numbers below 4; momentum 0.9 repeats each rounding ten times
        path_rounding=2e-6,
        steps=100,
    ),
    "Adam": Rule(
        dict(
            maximize=BOTH, amsgrad=BOTH, weight_decay=(0.0, 0.1), eps=(1e-30, 1e-8, 1e-2), decoupled_weight_decay=BOTH
        ),
        [
            dict(lr=-1.0), dict(lr=float("nan")), dict(lr="0.1"), dict(lr=torch.ones(2)), dict(betas=(-0.1, 0.9)),
            dict(betas=(1.0, 0.9)), dict(betas=(0.9, 1.0)), dict(eps=-1e-8), dict(weight_decay=-0.1),
            dict(fused=True, foreach=True),
        ],
        rounding=2e-6,
        path_rounding=2e-6,
        steps=100,
    ),
    "AdamW": Rule(
        dict(
            maximize=BOTH, amsgrad=BOTH, weight_decay=(0.0, 0.1), eps=(1e-30, 1e-8, 1e-2),
            betas=((0.9, 0.999), (0.0, 0.5)),
        ),
        [
            dict(lr=-1.0), dict(lr=float("nan")), dict(lr="0.1"), dict(lr=None), dict(lr=torch.ones(2)),
            dict(betas=(-0.1, 0.9)), dict(betas=(1.0, 0.9)), dict(betas=(0.9, 1.0)), dict(betas=(0.9, float("nan"))),
            dict(betas=0.9), dict(eps=-1e-8), dict(eps="0"), dict(weight_decay=-0.1), dict(weight_decay="0.1"),
            dict(fused=True, foreach=True),
        ],
        rounding=2e-6,
        path_rounding=2e-6,
        steps=100,
    ),
    "Adagrad": Rule(
        dict(
            maximize=BOTH, lr_decay=(0.0, 0.1), weight_decay=(0.0, 0.1), initial_accumulator_value=(0.0, 0.5),
            eps=(1e-10, 1e-2),
        ),
        [
            dict(lr=-1.0), dict(weight_decay=-0.1), dict(lr_decay=-1.0), dict(initial_accumulator_value=-1.0),
            dict(eps=-1.0),
        ],
        rounding=4e-6,
        path_rounding=2e-6,
    ),
    "RMSprop": Rule(
        dict(
            maximize=BOTH, momentum=(0.0, 0.9), centered=BOTH, weight_decay=(0.0, 0.1), alpha=(0.9, 0.99), eps=(1e-3,)
        ),
        [dict(lr=-1.0), dict(weight_decay=-0.1), dict(alpha=-1.0), dict(momentum=-1.0), dict(eps=-1.0)],
        rounding=2e-5,
        path_rounding=1e-5,
        lr=1e-3,
    ),
    "Adadelta": Rule(
        dict(maximize=BOTH, rho=(0.9, 0.5), weight_decay=(0.0, 0.1), eps=(1e-6, 1e-3)),
        [dict(lr=-1.0), dict(weight_decay=-0.1), dict(rho=1.5), dict(eps=-1.0)],
        rounding=2e-5,
        path_rounding=1e-5,
        lr=1.0,
    ),
    "Adamax": Rule(
        dict(maximize=BOTH, **BETAS, weight_decay=(0.0, 0.1), eps=(1e-8, 1e-2)),
        [dict(lr=-1.0), dict(weight_decay=-0.1), dict(betas=(1.0, 0.9)), dict(betas=(0.9, 1.0)), dict(eps=-1.0)],
        rounding=4e-6,
        path_rounding=2e-6,
    ),
    "NAdam": Rule(
        dict(
            maximize=BOTH, **BETAS, weight_decay=(0.0, 0.1), momentum_decay=(4e-3, 0.1), decoupled_weight_decay=BOTH
        ),
        [
            dict(lr=-1.0), dict(weight_decay=-0.1), dict(betas=(1.0, 0.9)), dict(betas=(0.9, 1.0)), dict(eps=-1.0),
            dict(momentum_decay=-1.0),
        ],
        rounding=4e-6,
        path_rounding=2e-6,
    ),
    "RAdam": Rule(
        dict(maximize=BOTH, **BETAS, weight_decay=(0.0, 0.1), eps=(1e-8, 1e-2), decoupled_weight_decay=BOTH),
        [dict(lr=-1.0), dict(weight_decay=-0.1), dict(betas=(1.0, 0.9)), dict(betas=(0.9, 1.0)), dict(eps=-1.0)],
        rounding=1e-5,
        path_rounding=1e-5,
    ),
}  # fmt: skip


def short(value):
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def cases(rows, *more):
    """(name, arguments) of every rule: `rows(rule)`."""
    found = [(name, kwargs) for name, rule in RULES.items() for kwargs in rows(rule)]
    return pytest.mark.parametrize(("name", "kwargs"), [*found, *more], ids=short)


EVERY_COMBINATION = cases(Rule.combinations)


def classes(name):
    return getattr(optimizers, name), getattr(torch.optim, name)


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return [[v.clone().requires_grad_() for v in values] for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@EVERY_COMBINATION
def test_follows_torch(train, name, kwargs, dtype):
    rule, params = RULES[name], parameters(dtype)
    both = [cls(own, lr=rule.lr, **kwargs) for cls, own in zip(classes(name), params, strict=True)]
    train(both, params, steps=rule.steps)
    tolerance = 1e-12 if dtype == torch.float64 else rule.rounding
    torch.testing.assert_close(*params, rtol=0, atol=tolerance)


@EVERY_COMBINATION
def test_the_compiled_step_is_the_reference_step(train, name, kwargs):
    rule, (compiled, reference) = RULES[name], parameters(torch.float32)
    ours, _ = classes(name)
    both = [ours(compiled, lr=rule.lr, **kwargs), ours(reference, lr=rule.lr, fused=False, **kwargs)]
    assert extension is None or both[0].explain().groups[0].path.startswith("compiled")
    assert both[1].explain().groups[0].path.startswith("reference")
    train(both, [compiled, reference], steps=10)
    torch.testing.assert_close(compiled, reference, rtol=0, atol=rule.path_rounding)


@cases(lambda rule: rule.combinations()[-2:])
@pytest.mark.parametrize("to_torch", [False, True])
def test_a_state_dict_continues_in_the_other_package(train, name, kwargs, to_torch):
    params = parameters(torch.float64)
    both = [cls(own, lr=RULES[name].lr, **kwargs) for cls, own in zip(classes(name), params, strict=True)]
    train(both, params, steps=5)
    source, target = both if to_torch else both[::-1]
    target.load_state_dict(copy.deepcopy(source.state_dict()))  # torch would alias these tensors
    train(both, params, steps=5, seed=2)
    torch.testing.assert_close(*params, rtol=0, atol=1e-12)


ADAFACTORS_BAD = [
    dict(lr=-1.0), dict(lr=torch.ones(2)), dict(lr=float("nan")), dict(lr="0.1"), dict(beta2_decay=0.1),
    dict(beta2_decay=None), dict(eps=(-1.0, 1e-3)), dict(eps=(None, -1.0)), dict(eps=(None, None)), dict(eps=1e-3),
    dict(d=0.5), dict(weight_decay=-0.1),
]  # fmt: skip


@cases(lambda rule: rule.bad, *(("Adafactor", kwargs) for kwargs in ADAFACTORS_BAD))
def test_a_bad_argument_raises_what_torch_raises(name, kwargs):
    ours, torchs = classes(name)
    with pytest.raises(Exception) as theirs:
        torchs([torch.ones(2, requires_grad=True)], **kwargs)
    with pytest.raises(theirs.type):
        ours([torch.ones(2, requires_grad=True)], **kwargs)


GROUPS = {
    "SGD": [
        dict(momentum=0.9, nesterov=True, dampening=0.0, weight_decay=0.1),
        dict(momentum=0.0, maximize=True),
        dict(lr=torch.tensor(2e-2, dtype=torch.float64), momentum=0.5, dampening=0.2),
    ],
    "Adam": [
        dict(lr=1e-3, betas=(0.5, 0.9), eps=1e-4, weight_decay=0.3),
        dict(maximize=True, amsgrad=True, decoupled_weight_decay=True, weight_decay=0.1),
        dict(lr=torch.tensor(2e-2, dtype=torch.float64), betas=(0.0, 0.0)),
    ],
    "AdamW": [
        dict(lr=1e-3, betas=(0.5, 0.9), eps=1e-4, weight_decay=0.3),
        dict(maximize=True, amsgrad=True),
        dict(lr=torch.tensor(2e-2, dtype=torch.float64), weight_decay=0.0),
    ],
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_differ_in_every_hyperparameter(train, name):
    both, params = [], parameters(torch.float64)
    for cls, own in zip(classes(name), params, strict=True):
        members = (own[:1], own[1:3], own[3:])
        groups = [dict(params=group, **kwargs) for group, kwargs in zip(members, GROUPS[name], strict=True)]
        both.append(cls(groups, lr=1e-2))
    train(both, params)
    torch.testing.assert_close(*params, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "kwargs"), [("SGD", dict(momentum=0.9)), ("AdamW", dict(lr=1e-2))])
def test_follows_a_scheduler_of_torch_that_changes_lr_and_momentum_or_beta1(train, name, kwargs):
    params = parameters(torch.float64)
    both = [cls(own, **kwargs) for cls, own in zip(classes(name), params, strict=True)]
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10) for o in both]
    for step in range(10):
        train(both, params, steps=1, seed=step)
        for scheduler in schedulers:
            scheduler.step()
    torch.testing.assert_close(*params, rtol=0, atol=1e-12)
