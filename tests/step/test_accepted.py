# SPDX-License-Identifier: Apache-2.0
"""Group values set by hand go through the constructor's checks before the next step changes anything."""

import math
import re

import numpy as np
import pytest
import torch

from lightning_optkit import optimizers
from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipValue, ZClip
from lightning_optkit.optimizers import LAMB, SGD, Adam, AdamW, Lion, Muon, Prodigy, RMSprop, ScheduleFreeAdamW
from lightning_optkit.step import step_in_backward

OURS = {name: cls for name, cls in vars(optimizers).items() if isinstance(cls, type) and hasattr(cls, "_torch_class")}
NAN = math.nan
BAD_LR = [-1.0, -1, 10**400, NAN, math.inf, "0.1", None, True, torch.ones(2), torch.tensor(-1.0), 1j]
BAD = {
    "weight_decay": [-1.0, NAN, "1", None, torch.ones(2)],
    "betas": [(2, 3), (0.9, 1.0), (0.9, NAN), (0.9,), "ab", torch.ones(2), [0.9, -1.0]],
    "eps": [-1.0, "1"],
    "l1": [-1.0, NAN, "1", torch.ones(1)],
    "cautious": ["yes", 1, None],
    "caution": ["yes", 1, None],
    "decouple_lr": ["yes", 1, None],
    "decay_lr": [-1.0, NAN, "1", None],
    "centralize": ["yes", 0],
    "rounding": ["up", None, 1],
    "rounding_seed": [-1, 0.5, "1"],
    "average_decay": [1.5, -0.1, NAN, "1"],
    "maximize": ["yes", 2, None, np.array([True, False])],
    "decoupled_weight_decay": ["yes", 2],
    "amsgrad": ["yes", 2],
    "differentiable": [True, "yes"],
    "fused": ["yes"],
    "foreach": ["yes", 2],
    "capturable": ["yes"],
}
CASES = [("lr", value) for value in BAD_LR] + [(name, value) for name, values in BAD.items() for value in values]


def trained(cls, steps=2, shape=(3, 4), groups=1, **kwargs):
    params = [torch.ones(shape, requires_grad=True) for _ in range(groups)]
    optimizer = cls([dict(params=[p]) for p in params], **kwargs)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in range(steps + 1):
        for p in params:
            p.grad = torch.full_like(p, 1.0 + step)
        if step < steps:
            optimizer.step()
    return optimizer, params


def seen(optimizer, frozen):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state.get(p, {}) for p in params]
    clip = optimizer.clip.state_dict() if hasattr(optimizer.clip, "state_dict") else None
    return frozen([params, states, clip]), optimizer.num_steps


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_a_bad_value_is_refused_before_anything_changes(name, value, fused, frozen):
    optimizer, params = trained(AdamW, average=EMA(0.9), clip=ZClip(), fused=fused)
    twin, twins = trained(AdamW, average=EMA(0.9), clip=ZClip(), fused=fused)
    before, good = seen(optimizer, frozen), optimizer.param_groups[0][name]
    for _ in range(2):  # and not once only
        optimizer.param_groups[0][name] = value
        with pytest.raises((TypeError, ValueError), match=r"^AdamW\.step[(:]") as refusal:
            optimizer.step()
        assert "\n" not in str(refusal.value)
        assert seen(optimizer, frozen) == before
    optimizer.param_groups[0][name] = good
    optimizer.step()
    twin.step()
    assert frozen(params) == frozen(twins)


@pytest.mark.parametrize("name", ["lr", "betas", "weight_decay", "l1", "rounding", "fused", "average_decay"])
def test_an_entry_taken_out_is_refused_in_one_sentence(name, frozen):
    optimizer, _ = trained(AdamW, groups=2, average=EMA(0.9))
    before = seen(optimizer, frozen)
    del optimizer.param_groups[1][name]
    with pytest.raises(ValueError, match=rf"^AdamW\.step\(param_groups\[1\]=\.\.\.\): must have an entry '{name}'\.$"):
        optimizer.step()
    assert seen(optimizer, frozen) == before


@pytest.mark.parametrize("cls", OURS.values(), ids=OURS)
def test_every_rule_refuses_a_bad_rate_in_the_words_of_its_constructor(cls, frozen):
    optimizer, params = trained(cls)
    before = seen(optimizer, frozen)
    with pytest.raises(ValueError) as constructor:
        cls(params, lr=-1)
    optimizer.param_groups[0]["lr"] = -1
    with pytest.raises(ValueError) as refusal:
        optimizer.step()
    assert str(refusal.value) == str(constructor.value).replace("(", ".step(", 1)
    assert seen(optimizer, frozen) == before


@pytest.mark.parametrize(
    ("cls", "kwargs", "name", "value"),
    [
        (SGD, dict(momentum=0.9), "nesterov", "yes"),
        (SGD, dict(momentum=0.9), "momentum", -1.0),
        (SGD, dict(momentum=0.9), "dampening", "a"),
        (RMSprop, {}, "centered", "yes"),
        (Lion, {}, "betas", (0.9, 0.99, 0.999)),
        (LAMB, {}, "norm_bounds", ("a", "b")),
        (LAMB, {}, "norm_bounds", (2.0, 1.0)),
        (Muon, {}, "ns_coefficients", (1.0, "b", 3.0)),
        (Muon, {}, "ns_steps", 1000),
        (Prodigy, {}, "growth_rate", 0.5),
        (ScheduleFreeAdamW, {}, "warmup_steps", -1),
        (ScheduleFreeAdamW, {}, "l1", 0.1),
    ],
)
def test_a_rules_own_entries_are_checked_too(cls, kwargs, name, value, frozen):
    optimizer, _ = trained(cls, **kwargs)
    before = seen(optimizer, frozen)
    optimizer.param_groups[0][name] = value
    with pytest.raises((TypeError, ValueError), match=rf"^{cls.__name__}\.step\(.*{name}"):
        optimizer.step()
    assert seen(optimizer, frozen) == before


def test_groups_that_must_agree_are_compared():
    optimizer, _ = trained(Prodigy, groups=2)
    optimizer.param_groups[1]["d_coef"] = 2.0
    with pytest.raises(ValueError, match=r"^Prodigy\.step\(d_coef=2\.0\): d_coef must be 1\.0 in all groups\.$"):
        optimizer.step()


def test_what_lies_in_a_list_or_a_tensor_is_looked_at_each_time(frozen):
    rate, betas, decay = torch.tensor(0.1), [0.9, 0.999], torch.tensor(0.1)
    optimizer, _ = trained(AdamW, lr=rate, betas=betas, weight_decay=decay)
    before = seen(optimizer, frozen)
    for change, back in (
        (lambda: rate.fill_(-1.0), lambda: rate.fill_(0.1)),
        (lambda: betas.__setitem__(0, 2.0), lambda: betas.__setitem__(0, 0.9)),
        (lambda: decay.fill_(NAN), lambda: decay.fill_(0.1)),
    ):
        change()
        with pytest.raises(ValueError, match=r"^AdamW\.step\("):
            optimizer.step()
        back()
    assert seen(optimizer, frozen) == before
    optimizer.step()


@pytest.mark.parametrize("pair", [np.array([0.9, 0.99]), torch.tensor([0.9, 0.99])], ids=["numpy", "torch"])
def test_a_pair_in_an_array_is_looked_at_each_time(pair):
    optimizer, _ = trained(AdamW, betas=pair)
    pair[0] = 2.0
    with pytest.raises(ValueError, match=r"^AdamW\.step\(betas\[0\]=.*2\.0.*\): betas\[0\] must be in \[0, 1\)\.$"):
        optimizer.step()


def test_what_has_not_changed_is_not_checked_again(monkeypatch):
    optimizer, _ = trained(Adam, groups=2)
    calls = []
    monkeypatch.setattr(Adam, "_check_group", lambda self, group: calls.append(group["eps"]))
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)  # a schedule
            group["note"] = step  # not an entry of the rule
        optimizer.step()
    assert calls == []
    optimizer.param_groups[1]["eps"] = 1e-6
    optimizer.step()
    assert calls == [1e-6]
    optimizer.add_param_group(dict(params=[torch.ones(2, requires_grad=True)], eps=1e-4))
    optimizer.step()
    optimizer.step()
    assert calls[1:] == [1e-4, 1e-4]  # when it was added, and before its first step


class Away(torch.Tensor):
    """A rate that says it is on an accelerator, and that must not be waited for."""

    is_cpu = False

    def item(self):
        raise AssertionError("waited for the device")

    __float__ = __bool__ = item


def test_a_rate_on_an_accelerator_is_not_read():
    optimizer, _ = trained(Adam)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5).as_subclass(Away)
    for _ in range(3):
        optimizer._check_changed()
    optimizer.param_groups[0]["lr"] = torch.ones(2).as_subclass(Away)
    with pytest.raises(ValueError, match=re.escape("Adam.step(lr=[2] tensor): lr must have one element.")):
        optimizer._check_changed()


def test_a_step_inside_the_backward_pass_checks_too(frozen):
    param = torch.ones(3, requires_grad=True)
    optimizer = SGD([param], lr=0.1, clip=ClipValue(1.0))
    step_in_backward(optimizer)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"SGD\.step\(lr=-1\.0\): lr must be in \[0, inf\)\."):
        param.sum().backward()
    assert torch.equal(param.detach(), torch.ones(3))
    assert not optimizer.state


def test_an_average_that_comes_later_brings_its_decay():
    optimizer, _ = trained(SGD, lr=0.1)
    optimizer.keep_average(EMA(0.9))
    optimizer.step()
    optimizer.param_groups[0]["average_decay"] = 2.0
    with pytest.raises(ValueError, match=r"^SGD\.step\(average_decay=2\.0\): average_decay must be in \[0, 1\)\.$"):
        optimizer.step()


@pytest.mark.parametrize(
    ("cls", "group"),
    [
        (Prodigy, dict(betas=(0.9, -1.0))),
        (Prodigy, dict(d0="a")),
        (SGD, dict(nesterov="yes")),
        (AdamW, dict(maximize="yes")),
        (AdamW, dict(rounding_seed=-1)),
    ],
)
def test_a_bad_group_is_refused_when_it_is_added(cls, group, snapshot):
    optimizer, _ = trained(cls)
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match=rf"^{cls.__name__}\("):
        optimizer.add_param_group(dict(params=[torch.ones(2, 2, requires_grad=True)], **group))
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("groups", [None, ["x"], [None], 3], ids=repr)
def test_groups_that_are_none_are_refused_in_a_sentence(groups):
    optimizer = SGD([torch.nn.Parameter(torch.ones(2))])
    optimizer.param_groups = groups
    with pytest.raises(TypeError, match=r"^SGD\.step: param_groups must be a list of dicts\.$"):
        optimizer.step()
