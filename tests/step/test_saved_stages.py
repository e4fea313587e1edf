# SPDX-License-Identifier: Apache-2.0
"""A state dict that was saved with another clip or average: said in one sentence, before anything is changed."""

import copy
import warnings

import pytest
import torch

from lightning_optkit import optimizers
from lightning_optkit.averaging import EMA, SWA, PowerEMA
from lightning_optkit.clipping import AutoClip, ClipNorm, ZClip
from lightning_optkit.optimizers import SGD, AdamW
from lightning_optkit.step.saved_stages import stages_of

WHAT = "AdamW.load_state_dict(state_dict=...): the checkpoint was saved with "


def build(rule=AdamW, **stages):
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))
    return rule([weight], lr=0.1, **stages), weight


def take_steps(optimizer, weight, seeds):
    for seed in seeds:
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()


def saved_by(rule=AdamW, **stages):
    optimizer, weight = build(rule, **stages)
    take_steps(optimizer, weight, range(3))
    return copy.deepcopy(optimizer.state_dict()), weight.detach().clone()


def loaded_by(state_dict, rule=AdamW, **stages):
    """The optimizer, its weight and what was said."""
    optimizer, weight = build(rule, **stages)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer.load_state_dict(copy.deepcopy(state_dict))
    return optimizer, weight, [str(each.message) for each in said]


# --- averages ---


@pytest.mark.parametrize("rule", [AdamW, SGD, optimizers.Muon, optimizers.Prodigy, optimizers.Adafactor])
def test_the_decay_given_now_counts_in_the_step_and_in_what_explain_prints(rule):
    state_dict, trained = saved_by(rule, average=EMA(0.9))
    optimizer, weight, said = loaded_by(state_dict, rule, average=EMA(0.5))
    assert len(said) == 1
    assert said[0].endswith("EMA(decay=0.9); its average goes on as EMA(decay=0.5), the one given here.")
    weight.data.copy_(trained)
    before = optimizer.state[weight]["ema"].clone()
    take_steps(optimizer, weight, [3])
    torch.testing.assert_close(optimizer.state[weight]["ema"], 0.5 * before + 0.5 * weight.detach())
    assert "EMA(decay=0.5, start=1, every=1)" in str(optimizer.explain())
    assert " at decay " not in str(optimizer.explain())


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (EMA(0.9), EMA(0.9, every=2)),
        (EMA(0.9), EMA(0.9, warmup="ratio")),
        (EMA(0.9), EMA(0.9, dtype=torch.bfloat16)),
        (PowerEMA(0.1), PowerEMA(0.05)),
        (SWA(1), SWA(1, every=3)),
    ],
    ids=str,
)
def test_other_settings_of_an_average_are_said_and_the_average_goes_on(before, now):
    state_dict, _ = saved_by(average=before)
    optimizer, weight, said = loaded_by(state_dict, average=now)
    assert len(said) == 1
    assert said[0].startswith(WHAT + f"average={type(before).__name__}(")
    assert "its average goes on as" in said[0]
    assert optimizer.state[weight]["num_averaged"] == 3


def test_a_start_is_no_other_average():
    state_dict, _ = saved_by(average=EMA(0.9))
    assert loaded_by(state_dict, average=EMA(0.9, start=2))[2] == []


@pytest.mark.parametrize("is_named", [True, False], ids=["named", "by an older version"])
def test_an_average_of_another_kind_begins_anew_with_its_own_decay(is_named):
    state_dict, _ = saved_by(average=SWA(1))
    state_dict["param_groups"][0]["initial_average_decay"] = 0.0
    if not is_named:
        del state_dict["stages"]
    optimizer, weight, said = loaded_by(state_dict, average=EMA(0.5))
    name = "SWA()" if is_named else "'swa'"
    assert said == [f"{WHAT}average={name}, not EMA(decay=0.5); that average is lost, and this one begins anew."]
    group = optimizer.param_groups[0]
    assert group["average_decay"] == 0.5
    assert "initial_average_decay" not in group
    take_steps(optimizer, weight, [3])
    assert torch.equal(optimizer.state[weight]["ema"], weight.detach())
    assert optimizer.state[weight]["num_averaged"] == 1


def test_an_average_that_is_left_out_is_said_to_be_lost_and_one_that_is_added_begins():
    optimizer, weight, said = loaded_by(saved_by(average=EMA(0.9))[0])
    lost = "and this optimizer has none; the average is lost: build it with the same to keep it."
    assert said == [f"{WHAT}average=EMA(decay=0.9), {lost}"]
    assert "ema" not in optimizer.state[weight]
    optimizer, weight, said = loaded_by(saved_by()[0], average=EMA(0.9))
    assert said == []
    take_steps(optimizer, weight, [3])
    assert optimizer.state[weight]["num_averaged"] == 1


@pytest.mark.parametrize("is_named", [True, False], ids=["named", "by an older version"])
def test_a_decay_that_was_scheduled_goes_on_and_explain_tells_it(is_named):
    optimizer, weight = build(average=EMA(0.9))
    optimizer.param_groups[0]["average_decay"] = 0.75
    take_steps(optimizer, weight, range(2))
    state_dict = copy.deepcopy(optimizer.state_dict())
    if not is_named:
        del state_dict["stages"]
    second, _, said = loaded_by(state_dict, average=EMA(0.9))
    assert said == []
    assert second.param_groups[0]["average_decay"] == 0.75
    assert "EMA(decay=0.9, start=1, every=1) at decay 0.75" in str(second.explain())


def test_groups_keep_their_own_decays():
    state_dict, _ = saved_by(average=EMA(0.9))
    optimizer, _ = build(average=EMA(0.5))
    optimizer.param_groups[0]["average_decay"] = 0.25
    with pytest.warns(UserWarning, match="goes on as"):
        optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["average_decay"] == 0.25


# --- clips ---


def test_what_a_clip_has_learned_goes_on_with_the_settings_given_now():
    state_dict, _ = saved_by(clip=AutoClip(10, window=5))
    optimizer, _, said = loaded_by(state_dict, clip=AutoClip(50, window=5))
    goes_on = (
        "what that has learned of the norms goes on as clip=AutoClip(percentile=50, window=5), the one given here."
    )
    assert said == [f"{WHAT}clip=AutoClip(percentile=10, window=5); {goes_on}"]
    assert optimizer.clip.percentile == 50
    assert optimizer.clip.state_dict()["seen"] == 3
    assert loaded_by(state_dict, clip=AutoClip(10, window=5))[2] == []


def test_a_clip_of_another_kind_begins_anew():
    state_dict, _ = saved_by(clip=AutoClip(10))
    optimizer, weight, said = loaded_by(state_dict, clip=ZClip())
    lost = "what that has learned of the norms is lost, and this one begins anew."
    assert said == [f"{WHAT}clip=AutoClip(percentile=10, window=1000), not {ZClip()!r}; {lost}"]
    assert optimizer.clip.state_dict()["learned"].tolist() == [0.0, 0.0, 0.0]
    assert optimizer.state[weight]["step"] == 3


@pytest.mark.parametrize("clip", [None, ClipNorm(1.0)], ids=str)
def test_a_clip_that_does_not_learn_has_nothing_to_lose(clip):
    assert loaded_by(saved_by(clip=AutoClip(10))[0], clip=clip)[2] == []
    assert loaded_by(saved_by(clip=clip)[0], clip=AutoClip(10))[2] == []


@pytest.mark.parametrize("is_named", [True, False], ids=["damaged", "of another clip, by an older version"])
def test_what_no_such_clip_has_learned_is_refused_before_anything_is_changed(is_named, snapshot):
    state_dict, _ = saved_by(clip=ZClip() if is_named else AutoClip(10))
    if is_named:
        state_dict["clip"]["learned"] = torch.full((3,), -1.0)
    else:
        del state_dict["stages"]
    optimizer, weight = build(clip=ZClip())
    take_steps(optimizer, weight, range(2))
    before, learned = snapshot(optimizer), optimizer.clip.state_dict()["learned"]
    next_step = (
        "give the clip of the run that saved it, or take 'clip' out of the state dict, and this one begins anew."
    )
    with pytest.raises(ValueError, match=r"^AdamW\.load_state_dict\(state_dict=\.\.\.\): 'clip' must be") as caught:
        optimizer.load_state_dict(state_dict)
    assert str(caught.value).endswith(next_step)
    assert snapshot(optimizer) == before
    assert torch.equal(optimizer.clip.state_dict()["learned"], learned)


# --- the entry ---


def test_where_warnings_are_errors_nothing_is_changed(snapshot):
    state_dict, _ = saved_by(average=EMA(0.9), clip=AutoClip(10))
    optimizer, weight = build(average=EMA(0.5), clip=AutoClip(50))
    take_steps(optimizer, weight, range(2))
    before = snapshot(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="goes on as"):
            optimizer.load_state_dict(state_dict)
    assert snapshot(optimizer) == before
    assert optimizer.clip.state_dict()["seen"] == 2


@pytest.mark.parametrize("stages", [3, {"clip": 3}, {"average": ["EMA"]}], ids=str)
def test_a_damaged_entry_is_refused(stages, snapshot):
    state_dict, _ = saved_by()
    optimizer, _ = build()
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match=r"^AdamW\.load_state_dict\(state_dict=\.\.\.\):? .*'stages'"):
        optimizer.load_state_dict({**state_dict, "stages": stages})
    assert snapshot(optimizer) == before


def test_a_clip_without_a_name_of_its_own_is_known_by_its_class():
    class Plain(ClipNorm):
        __repr__ = object.__repr__

    assert stages_of(Plain(1.0), None) == {"clip": "Plain()", "average": None}
    assert stages_of(Plain(1.0), None) == stages_of(Plain(2.0), None)
