# SPDX-License-Identifier: Apache-2.0
"""Without the callback that averages, a resumed run goes on from trained weights, and says that the average is lost."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

import lightning_optkit as ok
from tests.callbacks.seams.line import Line, eight_batches

pytestmark = pytest.mark.filterwarnings("ignore")
TRAINED = (
    "; the run goes on from the trained weights, not from the average in its state_dict, and the average is lost: "
)
LOST = "; the average is lost: give the same callback to keep it."


class Saves(pl.Callback):
    """Keeps the trained weights of the last step, and saves there, within the validation after it, and after that."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trained = pl_module.net.weight.detach().clone()
        trainer.save_checkpoint(self.folder / "in the fit.ckpt")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / "in validation.ckpt")

    def on_validation_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / "after validation.ckpt")


class Begins(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        self.weight = pl_module.net.weight.detach().clone()


def fit(*callbacks, epochs=2, ckpt_path=None):
    data = eight_batches()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    options = dict(accelerator="cpu", num_sanity_val_steps=0, max_epochs=epochs)
    trainer = pl.Trainer(callbacks=[*callbacks], **quiet, **options)
    trainer.fit(Line(), data, data, ckpt_path=ckpt_path)
    return trainer


def began(ckpt_path, *callbacks):
    """The weights with which a resumed run begins, and what it said of averages."""
    begins = Begins()
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        fit(*callbacks, begins, ckpt_path=ckpt_path)
    return begins.weight, [str(each.message) for each in records if "leaves it out" in str(each.message)]


PLACES = ["in the fit", "in validation", "after validation", "after the fit"]
AVERAGES = {
    "EMA": lambda: ok.WeightAveraging(ok.EMA(0.9)),
    "LAWA": lambda: ok.WeightAveraging(ok.LAWA(2, 2)),
    "not evaluated": lambda: ok.WeightAveraging(ok.EMA(0.9), evaluate=False),
    "Lightning's": lambda: EMAWeightAveraging(decay=0.9),
    "schedule-free": lambda: ok.ScheduleFreeWrapper(),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of the checkpoints of each average, and the trained weights."""
    results = {}
    for name, average in AVERAGES.items():
        saves = Saves(tmp_path_factory.mktemp("averaged"))
        fit(average(), saves, epochs=1).save_checkpoint(saves.folder / "after the fit.ckpt")
        results[name] = saves.folder, saves.trained
    return results


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("case", AVERAGES)
@pytest.mark.parametrize("others", [lambda: [ok.ExactResume()], lambda: [ok.Fuse(verbose=False), ok.ExactResume()]])
def test_it_goes_on_from_the_trained_weights(saved, case, where, others):
    if case == "Lightning's" and where != "in the fit":  # in validation it saves the two exchanged, after a fit one
        pytest.skip("Lightning saves no trained weights there")
    folder, trained = saved[case]
    weight, (said,) = began(folder / f"{where}.ckpt", *others())
    torch.testing.assert_close(weight, trained, rtol=0, atol=0)
    assert (LOST if case == "not evaluated" else TRAINED) in said


@pytest.mark.parametrize("before, now", [("EMA", "schedule-free"), ("schedule-free", "EMA")])
@pytest.mark.parametrize("where", PLACES)
def test_a_callback_in_place_of_the_other_goes_on_from_the_trained_weights(saved, before, now, where):
    folder, trained = saved[before]
    weight, (said,) = began(folder / f"{where}.ckpt", AVERAGES[now]())
    torch.testing.assert_close(weight, trained, rtol=0, atol=0)
    assert TRAINED in said


def test_an_average_that_only_the_first_run_evaluated(saved):
    folder, trained = saved["EMA"]
    weight, said = began(folder / "in the fit.ckpt", AVERAGES["not evaluated"]())
    assert torch.equal(weight, trained) and said == []


def test_with_the_callback_nothing_is_said(saved):
    folder, trained = saved["EMA"]
    weight, said = began(folder / "after the fit.ckpt", AVERAGES["EMA"](), ok.ExactResume())
    assert torch.equal(weight, trained) and said == []


# --- what is left in the states of torch's classes ---

SEVERAL = lambda: [  # noqa: E731
    ok.WeightAveraging(ok.EMA(0.9)),
    *[ok.WeightAveraging(each, evaluate=False) for each in (ok.EMA(0.5), ok.SWA(start=1), ok.LAWA(2, every=2))],
]


@pytest.mark.parametrize("averages", [lambda: [ok.WeightAveraging(ok.EMA(0.9))], SEVERAL], ids=["one", "several"])
def test_a_lost_average_does_not_come_back(tmp_path, averages):
    paths = [tmp_path / f"{place}.ckpt" for place in range(2)]
    fit(*averages(), ok.ExactResume(), epochs=1).save_checkpoint(paths[0])
    state = torch.load(paths[0], weights_only=True)["optimizer_states"][0]["state"][0]
    assert {"ema", "num_averaged"} < state.keys()
    fit(ok.ExactResume(), ckpt_path=paths[0]).save_checkpoint(paths[1])
    state = torch.load(paths[1], weights_only=True)["optimizer_states"][0]["state"][0]
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
