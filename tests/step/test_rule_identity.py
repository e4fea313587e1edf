# SPDX-License-Identifier: Apache-2.0
"""No rule loads the state dict of another, ours or torch's, before its first step or after."""

import copy

import pytest
import torch

from lightning_optkit import optimizers

OURS = {name: cls for name, cls in vars(optimizers).items() if isinstance(cls, type) and hasattr(cls, "_torch_class")}
TORCHS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and name not in ("Optimizer", "SparseAdam")
}
FAMILY = {name: cls._torch_class.__name__ for name, cls in OURS.items() if cls._torch_class}


def built(cls):
    param = torch.ones(3, 4, requires_grad=True)
    optimizer = cls([param])
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer, param


def stepped(optimizer, param, value=1.0):
    def closure():
        param.grad = torch.full_like(param, value)
        return torch.ones(())

    optimizer.step(closure)


def saved_by(cls, num_steps):
    optimizer, param = built(cls)
    for _ in range(num_steps):
        stepped(optimizer, param)
    return copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("num_steps", [0, 2], ids=["fresh", "stepped"])
@pytest.mark.parametrize("taker", OURS)
def test_a_rule_refuses_all_others_and_nothing_changes(taker, num_steps, snapshot):
    optimizer, param = built(OURS[taker])
    stepped(optimizer, param)
    before = snapshot(optimizer)
    sources = {f"ours {name}": cls for name, cls in OURS.items() if name != taker}
    sources |= {f"torch {name}": cls for name, cls in TORCHS.items() if name != FAMILY.get(taker)}
    taken = []
    for source, cls in sources.items():
        try:
            optimizer.load_state_dict(saved_by(cls, num_steps))
            taken.append(source)
        except (TypeError, ValueError) as refusal:
            assert str(refusal).startswith(f"{taker}.load_state_dict(state_dict=...): "), source
            assert "\n" not in str(refusal)
            assert snapshot(optimizer) == before
    assert taken == []


@pytest.mark.parametrize("num_steps", [0, 2], ids=["fresh", "stepped"])
@pytest.mark.parametrize("name", OURS)
def test_a_rule_takes_its_own_with_and_without_its_name_and_torchs(name, num_steps):
    own = saved_by(OURS[name], num_steps)
    nameless = {key: value for key, value in own.items() if key != "rule"}
    torchs = [saved_by(OURS[name]._torch_class, num_steps)] if OURS[name]._torch_class else []
    for state_dict in (own, nameless, *torchs):
        optimizer, param = built(OURS[name])
        optimizer.load_state_dict(state_dict)
        stepped(optimizer, param)


@pytest.mark.parametrize("source", ["LAMB", "ADOPT", "NAdam", "Adamax", "Lion", "Prodigy", "ScheduleFreeAdamW", "Adan"])
@pytest.mark.parametrize("taker", ["Adam", "RAdam", "Adamax", "LAMB", "ADOPT", "Lion"])
def test_a_state_dict_that_lost_its_name_is_told_by_entries_and_state(source, taker, snapshot):
    if source == taker:
        return
    state_dict = saved_by(OURS[source], 2)
    del state_dict["rule"]
    optimizer, param = built(OURS[taker])
    stepped(optimizer, param)
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match=rf"^{taker}\.load_state_dict\(state_dict=\.\.\.\): "):
        optimizer.load_state_dict(state_dict)
    assert snapshot(optimizer) == before


def test_a_class_that_a_user_derives_is_of_the_same_rule():
    class Mine(optimizers.AdamW):
        pass

    optimizer, _ = built(Mine)
    optimizer.load_state_dict(saved_by(optimizers.AdamW, 1))
    assert optimizer.state_dict()["rule"] == optimizers.Adam.__name__


@pytest.mark.parametrize("name", sorted(FAMILY))
def test_torchs_class_takes_a_state_dict_with_the_name_of_the_rule(name):
    optimizer, param = built(OURS[name]._torch_class)
    optimizer.load_state_dict(saved_by(OURS[name], 2))
    stepped(optimizer, param)


@pytest.mark.parametrize("entry", ["name", "initial_lr", "max_lr", "swa_lr", "lr_scale", "base_momentum"])
def test_entries_of_schedulers_and_users_are_of_no_rule(entry):
    state_dict = saved_by(optimizers.RAdam, 1)
    del state_dict["rule"]
    state_dict["param_groups"][0][entry] = 0.5
    optimizer, _ = built(optimizers.RAdam)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0][entry] == 0.5
