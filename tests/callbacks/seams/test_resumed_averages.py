# SPDX-License-Identifier: Apache-2.0
"""Averages with other settings, of another kind, or one fewer than in the run that saved the checkpoint."""

import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from average_cases import TOLERANCE, Trace, assert_equal, weights

import lightning_optkit as ok
from tests.callbacks.seams.line import Line, eight_batches

pytestmark = pytest.mark.filterwarnings("ignore")
SAVED, LAST = 8, 16  # steps: an epoch, and two
FUSED = [True, False]


class Saves(pl.Callback):
    """Within the fit, when the groups have the decay of an average in the step."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def averaging(*averages):
    return [ok.WeightAveraging(each, evaluate=not place) for place, each in enumerate(averages)]


def fit(averages, fused, *callbacks, epochs=2, ckpt_path=None):
    """The Trainer, the module, and the warnings of this package."""
    data = eight_batches()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    fuse = [ok.Fuse(verbose=False)] if fused else []
    trainer = pl.Trainer(callbacks=[*fuse, *averages, *callbacks], accelerator="cpu", max_epochs=epochs, **quiet)
    module = Line()
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        trainer.fit(module, data, ckpt_path=ckpt_path)
    said = [str(each.message) for each in records]
    return trainer, module, [each for each in said if "the checkpoint was saved with" in each]


@pytest.fixture(params=FUSED, ids=["fused", "own pass"])
def saved(request, tmp_path):
    """saved(*averages): a file after the first epoch, and its state_dict, the average."""

    def save(*averages):
        fit(averaging(*averages), request.param, Saves(tmp_path / "saved.ckpt"), epochs=1)
        return tmp_path / "saved.ckpt", torch.load(tmp_path / "saved.ckpt", weights_only=False)["state_dict"]

    return save


def exponential(average, trained, start, decay, every):
    for step in range(SAVED + 1, LAST + 1):
        if step >= start and (step - start) % every == 0:
            average = {name: value + (1 - decay) * (trained[step][name] - value) for name, value in average.items()}
    return average


@pytest.mark.parametrize("fused", FUSED, ids=["fused", "own pass"])
@pytest.mark.parametrize(
    ("now", "numbers"),
    [
        (ok.EMA(0.5), (1, 0.5, 1)),
        (ok.EMA(0.5, every=3), (1, 0.5, 3)),
        (ok.EMA(0.9, start=12), (12, 0.9, 1)),
        (ok.EMA(0.7, start=0.75, every=2), (12, 0.7, 2)),
    ],
    ids=str,
)
def test_an_average_goes_on_with_the_settings_given_now(saved, fused, now, numbers):
    file, average = saved(ok.EMA(0.9))
    trace, again = Trace(), averaging(now)
    _, module, said = fit(again, fused, trace, ckpt_path=file)
    start, decay, every = numbers
    assert_equal(weights(module), exponential(average, trace.trained, start, decay, every), TOLERANCE)
    assert said == [
        f"WeightAveraging({now!r}): the checkpoint was saved with EMA(decay=0.9, start=1, every=1); its average goes "
        "on with the settings given here."
    ]


@pytest.mark.parametrize(
    "before, now",
    [
        (ok.PowerEMA(0.2), ok.PowerEMA(0.1)),
        (ok.SWA(1), ok.SWA(1, every=2)),
        (ok.LAWA(3), ok.LAWA(5, every=3)),
        (ok.LAWA(5), ok.LAWA(2, every=3)),
    ],
    ids=str,
)
def test_other_averages_do_so_in_the_step_and_in_a_pass_alike(saved, before, now):
    file, _ = saved(before)
    results = [weights(fit(averaging(now), fused, ckpt_path=file)[1]) for fused in FUSED]
    assert_equal(results[0], results[1], TOLERANCE)
    assert not torch.equal(
        results[0]["net.weight"], weights(fit(averaging(before), True, ckpt_path=file)[1])["net.weight"]
    )


def test_with_the_same_average_a_decay_set_by_hand_is_the_saved_one(tmp_path):
    """As every entry of a group."""

    class Sets(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.optimizers[0].param_groups[0]["average_decay"] = 0.25

    path = tmp_path / "saved.ckpt"
    fit(averaging(ok.EMA(0.9)), True, Sets(), Saves(path), epochs=1)
    _, _, said = fit(averaging(ok.EMA(0.9)), True, Saves(path), ckpt_path=path)
    (state,) = torch.load(path, weights_only=False)["optimizer_states"]
    assert said == [] and state["param_groups"][0]["average_decay"] == 0.25


@pytest.mark.parametrize("is_first", [True, False], ids=["average first", "schedule first"])
@pytest.mark.parametrize("fused", FUSED, ids=["fused", "own pass"])
def test_a_schedule_multiplies_the_decay_given_now(tmp_path, fused, is_first):
    path = tmp_path / "saved.ckpt"

    def callbacks(decay):
        scheduled = ok.HyperparameterSchedule("average_decay", ok.schedules.constant(0.5), verbose=False)
        return [*averaging(ok.EMA(decay)), scheduled][:: 1 if is_first else -1]

    fit(callbacks(0.9), fused, Saves(path), epochs=1)
    trace = Trace()
    average = torch.load(path, weights_only=False)["state_dict"]
    _, module, _ = fit(callbacks(0.6), fused, trace, ckpt_path=path)
    assert_equal(weights(module), exponential(average, trace.trained, 1, 0.3, 1), TOLERANCE)


@pytest.mark.parametrize("fused", FUSED, ids=["fused", "own pass"])
def test_another_kind_begins_anew_and_says_what_is_lost(saved, fused, tmp_path):
    file, _ = saved(ok.EMA(0.9))
    trace = Trace()
    trainer, module, said = fit(averaging(ok.SWA(1)), fused, trace, ckpt_path=file)
    assert said == [
        "WeightAveraging(EMA(decay=0.9, start=1, every=1)): the checkpoint was saved with it, and this run leaves it "
        "out; the average is lost, and SWA(start=1, every=1) begins anew: give the same callback to keep it."
    ]
    mean = {name: torch.stack([each[name] for each in trace.trained.values()]).mean(0) for name in trace.trained[LAST]}
    assert_equal(weights(module), mean, TOLERANCE)
    trainer.save_checkpoint(tmp_path / "again.ckpt")  # a third run with an EMA would go on from one that is old
    (state,) = torch.load(tmp_path / "again.ckpt", weights_only=False)["optimizer_states"]
    assert all("ema" not in entries and "swa" in entries for entries in state["state"].values())


@pytest.mark.parametrize("fused", FUSED, ids=["fused", "own pass"])
def test_one_of_several_left_out_is_said(saved, fused, tmp_path):
    file, _ = saved(ok.EMA(0.9), ok.SWA(1))
    trainer, _, said = fit(averaging(ok.EMA(0.9)), fused, ckpt_path=file)
    assert said == [
        "WeightAveraging(SWA(start=1, every=1)): the checkpoint was saved with it, and this run leaves it out; the "
        "average is lost: give the same callback to keep it."
    ]
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    (state,) = torch.load(tmp_path / "again.ckpt", weights_only=False)["optimizer_states"]
    assert all("ema" in entries and "swa_2" not in entries for entries in state["state"].values())


def test_the_same_averages_and_one_more_are_said_nothing_of(saved):
    file, _ = saved(ok.EMA(0.9))
    assert fit(averaging(ok.EMA(0.9), ok.SWA(1)), True, ckpt_path=file)[2] == []


# --- in another order ---


def by_name(average):
    """A callback of the average, which is evaluated if it is the EMA of 0.9."""
    return ok.WeightAveraging(average, evaluate=average == ok.EMA(0.9))


def averages_after(averages, fused, file, *more):
    """What each average is at the end of a run that goes on from a file, as bytes would be, and what was said."""
    callbacks = [by_name(each) for each in averages]
    _, module, said = fit(callbacks, fused, *more, ckpt_path=file)
    return {each.average: each.averaged_parameters(module) for each in callbacks}, said


SEVERAL = [ok.EMA(0.9), ok.EMA(0.5), ok.SWA(2), ok.PowerEMA(0.2), ok.LAWA(2), ok.LAWA(3)]


@pytest.mark.parametrize("fused", FUSED, ids=["fused", "own pass"])
@pytest.mark.parametrize(
    "order", [[5, 4, 3, 2, 1, 0], [1, 0, 2, 3, 4, 5], [4, 2, 0, 5, 3, 1]], ids=["reversed", "two", "mixed"]
)
def test_the_order_of_the_callbacks_does_not_matter(saved, fused, order, tmp_path):
    file, _ = saved(*SEVERAL)
    before, _ = averages_after(SEVERAL, fused, file)
    path = tmp_path / "again.ckpt"
    after, said = averages_after([SEVERAL[place] for place in order], fused, file, Saves(path))
    assert said == []
    assert_equal({each: after[each] for each in SEVERAL}, before)
    (state,) = torch.load(path, weights_only=False)["optimizer_states"]
    names = {name for entries in state["state"].values() for name in entries if "_average" not in name}
    kept = {"ema", "ema_2", "swa_3", "power_ema_4", "lawa_snapshot_0", "lawa_6_snapshot_0"}
    assert kept <= names and "lawa_2_snapshot_0" not in names


@pytest.mark.parametrize("fused", FUSED, ids=["fused", "own pass"])
@pytest.mark.parametrize(
    ("before", "now"),
    [
        ([ok.EMA(0.9)], [ok.SWA(9), ok.EMA(0.9)]),
        ([ok.EMA(0.9)], [ok.EMA(0.5, start=9), ok.EMA(0.9)]),
        ([ok.EMA(0.9), ok.SWA(1)], [ok.PowerEMA(0.2, start=9), ok.SWA(1), ok.EMA(0.9)]),
        ([ok.SWA(1), ok.EMA(0.9)], [ok.EMA(0.9)]),
    ],
    ids=str,
)
def test_one_that_is_added_before_others_or_left_out_before_them_changes_none(saved, fused, before, now):
    file, _ = saved(*before)
    expected, _ = averages_after(before, fused, file)
    after, said = averages_after(now, fused, file)
    common = [each for each in now if each in before]
    assert_equal({each: after[each] for each in common}, {each: expected[each] for each in common})
    lost = [each for each in before if each not in now]
    assert [f"WeightAveraging({each!r}): the checkpoint was saved with it" in "".join(said) for each in lost] == [
        True for _ in lost
    ] and len(said) == len(lost)
    trace = Trace()
    averages_after(now, fused, file, trace)
    second = [trace.trained[step] for step in range(SAVED + 1, LAST + 1)]
    if now[0] == ok.SWA(9):
        mean = {name: torch.stack([each[name] for each in second]).mean(0) for name in second[0]}
        assert_equal(after[now[0]], mean, TOLERANCE)


@pytest.mark.parametrize("fused", FUSED, ids=["fused", "own pass"])
def test_other_settings_in_another_place_go_on_if_there_is_one_of_its_kind(saved, fused):
    file, average = saved(ok.EMA(0.9), ok.SWA(1))
    trace, again = Trace(), [ok.WeightAveraging(ok.SWA(1), evaluate=False), ok.WeightAveraging(ok.EMA(0.5))]
    _, module, said = fit(again, fused, trace, ckpt_path=file)
    assert_equal(weights(module), exponential(average, trace.trained, 1, 0.5, 1), TOLERANCE)
    assert said == [
        "WeightAveraging(EMA(decay=0.5, start=1, every=1)): the checkpoint was saved with EMA(decay=0.9, start=1, "
        "every=1); its average goes on with the settings given here."
    ]


def test_of_two_with_other_settings_each_goes_on_in_its_place(saved):
    file, _ = saved(ok.EMA(0.9), ok.EMA(0.5))
    _, _, said = fit(averaging(ok.EMA(0.8), ok.EMA(0.6)), True, ckpt_path=file)
    pairs = [("0.8", "0.9"), ("0.6", "0.5")]
    assert [
        f"WeightAveraging(EMA(decay={now}, start=1, every=1)): the checkpoint was saved with EMA(decay={before}, "
        in each
        for each, (now, before) in zip(said, pairs, strict=True)
    ] == [True, True]


def test_averages_of_buffers_go_with_them(tmp_path):
    """Those of each are under its name too."""

    def callbacks(*averages):
        each = [ok.WeightAveraging(average, evaluate=not n, average_buffers=True) for n, average in enumerate(averages)]
        return each

    path, again = tmp_path / "saved.ckpt", tmp_path / "again.ckpt"
    fit(callbacks(ok.EMA(0.9), ok.SWA(1)), True, CountsBatches(), Saves(path), epochs=1)
    fit(callbacks(ok.EMA(0.9), ok.SWA(1)), True, CountsBatches(), Saves(again), ckpt_path=path)
    expected = torch.load(again, weights_only=False)["callbacks"]
    fit(callbacks(ok.SWA(1), ok.EMA(0.9)), True, CountsBatches(), Saves(again), ckpt_path=path)
    found = torch.load(again, weights_only=False)["callbacks"]
    keys = [key for key in expected if "average" in key]
    assert len(keys) == 2 and all(expected[key]["buffers"]["seen"] for key in keys)
    assert [found[key] for key in keys] == [expected[key] for key in keys]


class CountsBatches(pl.Callback):
    """Gives the module a buffer that changes in each batch."""

    def setup(self, trainer, pl_module, stage):
        pl_module.register_buffer("seen", torch.zeros(()))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.seen += 1


def test_the_state_of_another_average_is_refused_where_a_fit_does_not_match_them():
    callback, state = ok.WeightAveraging(ok.EMA(0.9)), {"steps": 3, "name": "ema_2", "buffers": {}}
    with pytest.raises(
        ValueError, match=r"^WeightAveraging\(EMA\(.*\)\)\.load_state_dict: .*'ema_2', and here .*'ema';"
    ):
        callback.load_state_dict(state)
    assert callback.state_dict()["steps"] == 0
