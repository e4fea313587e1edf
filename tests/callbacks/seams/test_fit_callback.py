# SPDX-License-Identifier: Apache-2.0
"""Changes of a callback are undone once, in reverse order, however the fit ends."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks.seams.fit_callback import FitCallback


class Module(pl.LightningModule):
    def __init__(self, fails=None):
        super().__init__()
        self.net, self.fails = torch.nn.Linear(4, 2), fails

    def training_step(self, batch, batch_idx):
        if self.fails is not None:
            raise self.fails
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Changing(FitCallback):
    """Records the order of undos."""

    def __init__(self, failing=()):
        self.undone, self.failing, self.forgotten = [], failing, 0

    def setup(self, trainer, pl_module, stage):
        original = pl_module.training_step
        self._override(pl_module, "training_step", lambda batch, batch_idx: original(batch, batch_idx))
        self._override(trainer.fit_loop, "advance", lambda advance=trainer.fit_loop.advance: advance())
        for name in ("first", "second", "third"):
            self._at_end(lambda name=name: self.undo(name))

    def undo(self, name):
        self.undone.append(name)
        if name in self.failing:
            raise RuntimeError(f"{name} failed")

    def _forget(self):
        self.forgotten += 1


def trainer_with(callback, **arguments):
    return pl.Trainer(
        callbacks=[callback], max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", **arguments,
    )  # fmt: skip


def fit(callback, module):
    trainer = trainer_with(callback)
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4))
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fails", [None, RuntimeError("mid-fit"), KeyboardInterrupt()], ids=repr)
def test_all_is_undone_in_reverse_order_however_the_fit_ends(fails):
    callback, module = Changing(), Module(fails)
    before = set(vars(module))
    trainer = trainer_with(callback)
    try:
        trainer.fit(module, DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4))
        assert fails is None
    except (RuntimeError, SystemExit, KeyboardInterrupt):
        assert fails is not None
    assert callback.undone == ["third", "second", "first"]
    assert "training_step" not in set(vars(module)) - before and "advance" not in vars(trainer.fit_loop)
    assert callback.forgotten >= 1


def test_undoing_again_does_nothing():
    callback, module = Changing(), Module()
    trainer = fit(callback, module)
    callback.teardown(trainer, module, "fit")
    callback.on_exception(trainer, module, RuntimeError())
    assert callback.undone == ["third", "second", "first"]


def test_another_stage_undoes_nothing():
    callback, module = Changing(), Module()
    trainer = trainer_with(callback)
    callback.setup(trainer, module, "fit")
    callback.teardown(trainer, module, "validate")
    assert callback.undone == []
    callback.teardown(trainer, module, "fit")
    assert callback.undone == ["third", "second", "first"]


def test_an_undo_that_fails_keeps_no_other_from_running():
    callback, module = Changing(failing=("second",)), Module()
    with pytest.raises(RuntimeError, match="second failed"):
        fit(callback, module)
    assert callback.undone == ["third", "second", "first"]
    assert "training_step" not in vars(module)
    assert callback.forgotten >= 1


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_made_in_the_fit_has_nothing_to_undo(duplicate):
    callback, module = Changing(), Module()
    trainer = trainer_with(callback)
    callback.setup(trainer, module, "fit")
    twin = duplicate(callback)
    twin.teardown(trainer, module, "fit")
    assert twin.undone == [] and "training_step" in vars(module)
    callback.teardown(trainer, module, "fit")
    assert callback.undone == ["third", "second", "first"] and "training_step" not in vars(module)


def test_it_can_be_fitted_again():
    callback, module = Changing(), Module()
    fit(callback, module)
    fit(callback, module)
    assert callback.undone == ["third", "second", "first"] * 2
