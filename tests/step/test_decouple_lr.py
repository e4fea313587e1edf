# SPDX-License-Identifier: Apache-2.0
"""Decay that follows the schedule but not the base rate, against the formula in fp64."""

import io
import math

import pytest
import torch

from lightning_optkit import optimizers
from lightning_optkit.optimizers import (
    ADOPT,
    CAME,
    MARS,
    SGD,
    SOAP,
    AdaBelief,
    Adafactor,
    Adam,
    AdamW,
    Adan,
    AdEMAMix,
    DAdaptAdam,
    Lion,
    Muon,
    NAdam,
    Prodigy,
    RAdam,
    ScheduleFreeAdamW,
    Signum,
    SophiaG,
    StableAdamW,
    parameter_groups,
)
from lightning_optkit.optimizers.convert import from_torch_, to_torch_

DECAY, SCHEDULE = 0.01, [0.0, 0.25, 1.0, 1.0, 0.5, 0.1, 0.0, 0.75]
DECOUPLED = {
    "AdamW": (AdamW, {}),
    "Adam": (Adam, dict(decoupled_weight_decay=True)),
    "NAdam": (NAdam, dict(decoupled_weight_decay=True)),
    "RAdam": (RAdam, dict(decoupled_weight_decay=True)),
    "Lion": (Lion, {}),
    "AdEMAMix": (AdEMAMix, {}),
    "AdaBelief": (AdaBelief, {}),
    "CAME": (CAME, {}),
    "SOAP": (SOAP, {}),
    "MARS": (MARS, {}),
    "Signum": (Signum, {}),
    "SophiaG": (SophiaG, {}),
    "StableAdamW": (StableAdamW, {}),
    "Adafactor": (Adafactor, {}),
    "ADOPT": (ADOPT, dict(decouple=True)),
    "Adan": (Adan, dict(no_prox=True)),
    "Muon": (Muon, {}),
}
PATHS = pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
OTHERWISE = {"ScheduleFreeAdamW"}  # it decays at y: a test of its own
FLAGS = [{}, dict(decoupled_weight_decay=True), dict(decouple=True), dict(no_prox=True)]


def takes_decouple_lr(cls, flags):
    try:
        cls([fresh()], decouple_lr=True, **flags)
    except (TypeError, ValueError):  # the flag of another rule, or a decay that is L2
        return False
    return True


def test_every_rule_with_decoupled_decay_is_tried():
    rules = {name: getattr(optimizers, name) for name in optimizers.__all__}
    rules = {name: cls for name, cls in rules.items() if hasattr(cls, "_torch_class")}
    taking = {name for name, cls in rules.items() if any(takes_decouple_lr(cls, flags) for flags in FLAGS)}
    assert taking == DECOUPLED.keys() | OTHERWISE


def fresh(shape=(40, 24), seed=0):
    return torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def trained(cls, kwargs, factors=SCHEDULE, lr=0.02, grad=0.0, fused=None, **more):
    """A parameter after one step at each factor of the rate; with zero gradients only the decay moves it."""
    param = fresh()
    optimizer = cls([param], lr=lr, weight_decay=DECAY, **kwargs, **more)
    optimizer.param_groups[0]["fused"] = fused
    if hasattr(optimizer, "train"):
        optimizer.train()
    for factor in factors:
        optimizer.param_groups[0]["lr"] = lr * factor
        param.grad = torch.full_like(param, grad)
        optimizer.step()
    return param.detach(), optimizer


@PATHS
@pytest.mark.parametrize("name", DECOUPLED)
@pytest.mark.parametrize("lr", [0.02, 5.0])
def test_decay_is_the_schedules_factor_whatever_the_base_rate(name, lr, fused):
    cls, kwargs = DECOUPLED[name]
    found, _ = trained(cls, kwargs, lr=lr, decouple_lr=True, fused=fused)
    factors = SCHEDULE[1:] if cls is ADOPT else SCHEDULE  # its first step updates nothing
    expected = fresh().detach().double() * math.prod(1 - DECAY * factor for factor in factors)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)


@PATHS
def test_a_proximal_decay_divides_by_the_factor(fused):
    found, _ = trained(Adan, dict(no_prox=False), lr=5.0, decouple_lr=True, fused=fused)
    expected = fresh().detach().double() / math.prod(1 + DECAY * factor for factor in SCHEDULE)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)


@PATHS
def test_the_decay_at_y_of_schedule_free_follows_the_warm_up_but_not_the_rate(fused):
    """y and z move by the same decay, so with zero gradients all of y, z and x stay multiples of the start."""
    kwargs = dict(warmup_steps=4)
    found = [trained(ScheduleFreeAdamW, kwargs, [1.0] * 6, lr, decouple_lr=True, fused=fused)[0] for lr in (0.1, 3.0)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)
    coupled = [trained(ScheduleFreeAdamW, kwargs, [1.0] * 6, lr, fused=fused)[0] for lr in (0.1, 1.0)]
    start = fresh().detach()
    assert 5 < float((1 - found[0] / start).mean() / (1 - coupled[0] / start).mean()) < 15
    torch.testing.assert_close(found[0], coupled[1], rtol=1e-5, atol=0)  # at the rate 1 both are the same


@PATHS
@pytest.mark.parametrize("name", DECOUPLED)
def test_with_gradients_it_is_ordinary_decay_by_the_quotient(name, fused):
    cls, kwargs = DECOUPLED[name]
    found, _ = trained(cls, kwargs, grad=0.3, fused=fused, decouple_lr=True)
    param = fresh()
    ordinary = cls([param], lr=0.02, weight_decay=DECAY / 0.02, **kwargs)
    ordinary.param_groups[0]["fused"] = fused
    for factor in SCHEDULE:
        ordinary.param_groups[0]["lr"] = 0.02 * factor
        param.grad = torch.full_like(param, 0.3)
        ordinary.step()
    assert torch.equal(found, param.detach())


def test_both_paths_give_the_same_bits_also_cautiously():
    for cautious in (False, True):
        kwargs = dict(grad=0.3, decouple_lr=True, cautious=cautious)
        compiled, reference = (trained(Lion, {}, fused=fused, **kwargs)[0] for fused in (None, False))
        assert torch.equal(compiled, reference)


def test_a_rate_in_a_tensor_changes_nothing():
    param, other = fresh(), fresh()
    given, plain = (
        AdamW([p], lr=lr, weight_decay=DECAY, decouple_lr=True)
        for p, lr in ((param, torch.tensor(0.5, dtype=torch.float64)), (other, 0.5))
    )
    for factor in SCHEDULE:
        given.param_groups[0]["lr"].fill_(0.5 * factor)
        plain.param_groups[0]["lr"] = 0.5 * factor
        for p, optimizer in ((param, given), (other, plain)):
            p.grad = torch.ones_like(p)
            optimizer.step()
    assert torch.equal(param, other)


@pytest.mark.parametrize(
    ("cls", "kwargs", "said"),
    [
        (SGD, {}, "SGD(decouple_lr=True): needs decoupled weight decay, such as that of AdamW."),
        (Adam, {}, "Adam(decouple_lr=True): needs decoupled weight decay, such as that of AdamW."),
        (ADOPT, {}, "ADOPT(decouple_lr=True): needs decoupled weight decay, such as that of AdamW."),
        (optimizers.LAMB, {}, "LAMB(decouple_lr=True): needs decoupled weight decay, such as that of AdamW."),
        (optimizers.LARS, {}, "LARS(decouple_lr=True): needs decoupled weight decay, such as that of AdamW."),
        (
            DAdaptAdam,
            dict(decouple=True),
            "DAdaptAdam(decouple_lr=True): must be False; the rate is estimated, also that of decay.",
        ),
        (
            Prodigy,
            {},
            "Prodigy(decouple_lr=True): must be False; the rate is estimated, also that of decay.",
        ),
        (
            AdamW,
            dict(lr=0.0),
            "AdamW(decouple_lr=True): decay_lr, the lr that a group is added with, must not be 0.",
        ),
        (AdamW, dict(decouple_lr=1), "AdamW(decouple_lr=1): decouple_lr must be one of False, True."),
    ],
)
def test_what_cannot_be_decoupled_is_refused_in_a_sentence(cls, kwargs, said):
    with pytest.raises((TypeError, ValueError)) as refusal:
        cls([fresh()], **{"decouple_lr": True, **kwargs})
    assert str(refusal.value) == said


@pytest.mark.parametrize("value", [-1.0, math.nan, "1", None])
def test_a_bad_base_rate_of_a_group_is_refused(value):
    with pytest.raises((TypeError, ValueError), match=r"AdamW\(decay_lr="):
        AdamW([dict(params=[fresh()], decay_lr=value)], decouple_lr=True)


def test_each_group_has_its_own_base_rate_also_one_that_is_added_while_a_schedule_runs():
    first, second, third = fresh(), fresh(), fresh()
    optimizer = AdamW([dict(params=[first], lr=0.1), dict(params=[second])], lr=0.01, decouple_lr=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    optimizer.add_param_group(dict(params=[third], lr=0.02, initial_lr=0.04))
    assert [group["decay_lr"] for group in optimizer.param_groups] == [0.1, 0.01, 0.04]
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.005, 0.02]
    assert scheduler.base_lrs == [0.1, 0.01]


def test_the_same_share_decays_in_all_layers_of_a_layerwise_rate():
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(4)))
    optimizer = AdamW(parameter_groups(model, layer_decay=0.5, lr=1e-2), weight_decay=DECAY, decouple_lr=True)
    before = [weight.detach().clone() for weight in model.parameters()]
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert len({group["lr"] for group in optimizer.param_groups}) == 4
    for weight, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(weight.detach(), old * (1 - DECAY), rtol=1e-6, atol=0)


def test_a_checkpoint_has_the_base_rate_and_torchs_dicts_load_without_it():
    _, saved = trained(AdamW, {}, SCHEDULE[:5], decouple_lr=True)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    resumed = AdamW([fresh()], lr=9.0, weight_decay=1.0)
    resumed.load_state_dict(torch.load(file))
    group = resumed.param_groups[0]
    assert (group["decay_lr"], group["decouple_lr"], group["weight_decay"]) == (0.02, True, DECAY)

    theirs = torch.optim.AdamW([fresh()], lr=0.5, weight_decay=DECAY).state_dict()
    ours = AdamW([fresh()], lr=0.25, decouple_lr=True)
    ours.load_state_dict(theirs)
    group = ours.param_groups[0]
    assert (group["lr"], group["decay_lr"], group["decouple_lr"]) == (0.5, 0.25, True)


def test_a_conversion_adds_and_removes_the_entries_and_leaves_torchs():
    optimizer = torch.optim.AdamW([fresh()], lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    before = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    from_torch_(optimizer)
    assert optimizer.param_groups[0]["decay_lr"] == optimizer.param_groups[0]["initial_lr"] == 1.0 / 25
    to_torch_(optimizer)
    assert {key: value for key, value in optimizer.param_groups[0].items() if key != "params"} == before
    optimizer.step()
    scheduler.step()


def test_the_explanation_names_the_rate_at_which_all_of_the_decay_acts():
    param = fresh()
    plan = AdamW([param], lr=0.02, weight_decay=1e-4, decouple_lr=True, cautious=True).explain().groups[0]
    assert "cautious decay(0.0001 at lr 0.02)" in plan.stages
    assert "decay(0.0001)" in AdamW([param], lr=0.02, weight_decay=1e-4).explain().groups[0].stages
