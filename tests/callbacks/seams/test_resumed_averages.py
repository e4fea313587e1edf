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
