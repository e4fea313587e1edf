# SPDX-License-Identifier: Apache-2.0
"""A state dict fitted to other groups by names: states and settings follow the parameters, and guesses are refused."""

import copy

import pytest
import torch

from lightning_optkit.optimizers import AdamW
from lightning_optkit.step.matching import match_groups, names_in_groups

SAVED = {
    "state": {0: "of a", 1: "of b", 2: "of c", 3: "of d"},
    "param_groups": [
        {"params": [0, 1], "lr": 0.1, "weight_decay": 0.3, "name": "decay"},
        {"params": [2, 3], "lr": 0.1, "weight_decay": 0.0, "name": "rest"},
    ],
}
NAMES = dict(enumerate("abcd"))


def groups(*each):
    return [{"params": [*names], "lr": 1.0, **settings} for names, settings in each]


def match(here, saved=SAVED, names=NAMES, aliases=None):
    of = aliases or {}
    return match_groups("AdamW:", saved, names, here, [[of.get(p, [p]) for p in group["params"]] for group in here])


def test_settings_go_with_the_parameters():
    matched = match(groups(("dc", {"name": "x"}), ("ba", {})))
    assert matched.origins == [1, 0]
    first, second = matched.state_dict["param_groups"]
    assert first == {"params": [3, 2], "lr": 0.1, "weight_decay": 0.0, "name": "rest"}
    assert second == {"params": [1, 0], "lr": 0.1, "weight_decay": 0.3, "name": "decay"}
    assert matched.state_dict["state"] is SAVED["state"]


def test_the_same_groups_are_left_as_they_are():
    matched = match(groups(("ab", {}), ("cd", {})))
    assert matched.state_dict == SAVED and matched.origins == [0, 1]


def test_groups_of_equal_settings_may_be_divided_and_joined():
    alike = copy.deepcopy(SAVED)
    alike["param_groups"][1]["weight_decay"] = 0.3
    for here in (groups(("abcd", {})), groups(("ac", {}), ("bd", {})), groups(("a", {}), ("b", {}), ("cd", {}))):
        matched = match(here, alike)
        assert all(group["weight_decay"] == 0.3 and group["lr"] == 0.1 for group in matched.state_dict["param_groups"])
        assert [g["params"] for g in matched.state_dict["param_groups"]] == [
            ["abcd".index(name) for name in group["params"]] for group in here
        ]


def test_a_shared_parameter_has_any_of_its_names():
    assert match(groups(("ax", {}), ("cd", {})), aliases={"x": ["first", "b"]}).origins == [0, 1]


REFUSED = {
    "joined": (groups(("abcd", {})), "a and c are in one group here, .* weight_decay=0.3 and 0.0; resume with"),
    "moved": (groups(("abc", {}), ("d", {})), "a and c are in one group here"),
    "divided to differ": (
        groups(("a", {"weight_decay": 0.5}), ("b", {"weight_decay": 0.6}), ("cd", {})),
        "a and b have weight_decay=0.5 and 0.6 here, .* on_train_start",
    ),
    "added": (groups(("ab", {}), ("cde", {})), "has no e, which this one has"),
    "removed": (groups(("ab", {}), ("c", {})), "has d, which this one lacks"),
    "renamed": (groups(("ab", {}), ("ce", {})), "has d and no e, .* 'parameter_names' .* on_load_checkpoint"),
    "an empty group": (groups(("ab", {}), ("cd", {}), ("", {})), "its group 2 has no parameters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_guesses_are_refused(case):
    here, said = REFUSED[case]
    before = copy.deepcopy((SAVED, here))
    with pytest.raises(ValueError, match=f"AdamW: .*{said}"):
        match(here)
    assert (SAVED, here) == before


# --- in an optimizer whose groups have torch's names ---


def built(*orders, rates=(0.1, 0.01)):
    """AdamW with named groups, after a step; the parameters by name."""
    params = {name: torch.nn.Parameter(torch.full((3,), float(place))) for place, name in enumerate("abcd")}
    given = [{"params": [(n, params[n]) for n in names], "lr": lr} for names, lr in zip(orders, rates, strict=True)]
    return AdamW(given), params


def test_an_optimizer_with_named_parameters_loads_by_name():
    saved, params = built("ab", "cd")
    for place, param in enumerate(params.values()):
        param.grad = torch.full((3,), float(place + 1))
    saved.step()
    loaded, others = built("dc", "ba")
    loaded.load_state_dict(saved.state_dict())
    for name, param in others.items():
        assert torch.equal(loaded.state[param]["exp_avg"], saved.state[params[name]]["exp_avg"])
    assert [group["lr"] for group in loaded.param_groups] == [0.01, 0.1]
    assert [group["param_names"] for group in loaded.param_groups] == [["d", "c"], ["b", "a"]]


def test_other_names_are_no_reason_to_refuse():
    saved, _ = built("ab", "cd")
    renamed = copy.deepcopy(saved.state_dict())
    renamed["param_groups"][0]["param_names"] = ["x", "y"]
    loaded, _ = built("ab", "cd")
    loaded.load_state_dict(renamed)
    assert [group["lr"] for group in loaded.param_groups] == [0.1, 0.01]


@pytest.mark.parametrize("names", [None, 3, "w", [3], [None], ["w", "v"], []])
def test_names_that_are_none_are_left_alone(names):
    group = {"params": [0]} if names is None else {"params": [0], "param_names": names}
    named = {"params": [1], "param_names": ["v"]}
    assert names_in_groups({"param_groups": [named]}) == {1: "v"}
    assert names_in_groups({"param_groups": [{"params": []}, named]}) is None
    assert names_in_groups({"param_groups": [named, group]}) is None
