# SPDX-License-Identifier: Apache-2.0
"""A state dict that does not belong is refused in one sentence, and nothing changes."""

import copy

import pytest
import torch

from lightning_optkit.averaging import EMA
from lightning_optkit.optimizers import SGD, Adam, AdamW
from tests.step.loading_cases import give_gradients, steps, two_groups


def saved(optimizer_class, sizes=((3,), (5, 2)), shape=None, edit=None, **kwargs):
    groups = [[torch.ones(n if shape is None else shape, dtype=torch.float64) for n in group] for group in sizes]
    params = [p.requires_grad_() for group in groups for p in group]
    optimizer = optimizer_class([dict(params=group) for group in groups], **kwargs)
    give_gradients(params, 0)
    optimizer.step()
    state_dict = copy.deepcopy(optimizer.state_dict())
    if edit:
        edit(state_dict)
    return state_dict


def with_a_strange_state(state_dict):
    state_dict["state"][0]["hessian"] = torch.ones(3)


def with_a_last_state_of_another_shape(state_dict):
    state_dict["state"][1]["exp_avg_sq"] = torch.ones(7)


def without_betas(state_dict):
    for group in state_dict["param_groups"]:
        del group["betas"]


FOREIGN = {
    "of SGD": (saved(torch.optim.SGD, momentum=0.9), "another rule"),
    "of our SGD": (saved(SGD, momentum=0.9), "another rule"),
    "of RMSprop": (saved(torch.optim.RMSprop), "another rule"),
    "of Adam": (saved(torch.optim.Adam), "another rule.*decoupled_weight_decay"),
    "of our Adam": (saved(Adam), "another rule.*decoupled_weight_decay"),
    "of more groups": (saved(AdamW, sizes=((3,), (5,), (2,))), r"groups of \[1, 1, 1\] parameters, .* of \[1, 2\]"),
    "of smaller groups": (saved(AdamW, sizes=((3,), (5,))), r"groups of \[1, 1\] parameters, .* of \[1, 2\]"),
    "of other shapes": (saved(AdamW, shape=(4,)), r"'exp_avg' has shape \[4\], its parameter \[3\]"),
    "with a last state of another shape": (
        saved(AdamW, edit=with_a_last_state_of_another_shape),
        r"'exp_avg_sq' has shape \[7\], its parameter \[5\]",
    ),
    "with a strange state": (saved(AdamW, edit=with_a_strange_state), "another rule; it holds the state 'hessian'"),
    "of Adafactor": (saved(torch.optim.Adafactor), "another rule; its groups have no 'amsgrad', 'betas'"),
    "without betas": (saved(AdamW, edit=without_betas), "another rule; its groups have no 'betas'"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_checkpoint_that_does_not_belong_is_refused_in_one_sentence_and_nothing_changes(case, snapshot):
    state_dict, message = FOREIGN[case]
    optimizer, params = two_groups(AdamW, lr=0.1, average=EMA(0.9), clip=None)
    steps(optimizer, params, range(2))
    before, tensors = snapshot(optimizer), [dict(state) for state in optimizer.state.values()]
    with pytest.raises(ValueError, match=rf"^AdamW\.load_state_dict\(state_dict=\.\.\.\): .*{message}") as raised:
        optimizer.load_state_dict(state_dict)
    assert "\n" not in str(raised.value)
    assert snapshot(optimizer) == before
    for state, kept in zip(optimizer.state.values(), tensors, strict=True):
        assert all(state[name] is kept[name] for name in kept)


def test_a_checkpoint_of_adamw_is_refused_by_sgd(snapshot):
    optimizer, params = two_groups(SGD, momentum=0.9)
    steps(optimizer, params, range(2))
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match=r"^SGD\.load_state_dict\(state_dict=\.\.\.\): the checkpoint is of another rule"
    ):
        optimizer.load_state_dict(saved(torch.optim.AdamW))
    assert snapshot(optimizer) == before


def test_an_entry_of_the_users_own_in_a_group_does_not_make_it_another_rule():
    p, q = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    saved = AdamW([p], lr=0.5).state_dict()
    optimizer = AdamW([dict(params=[q], layer=3)])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
