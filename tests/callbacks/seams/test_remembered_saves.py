# SPDX-License-Identifier: Apache-2.0
"""ModelCheckpoint chooses the same files in a resumed run, also where a step has several batches."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import ExactResume

pytestmark = pytest.mark.filterwarnings("ignore")


class Failure(Exception):
    pass


class Net(pl.LightningModule):
    """Fails before this batch of its second epoch."""

    def __init__(self, fails_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.fails_at = nn.Linear(2, 1), fails_at

    def on_train_batch_start(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (1, self.fails_at):
            raise Failure

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.net(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(folder, fails_at=None, ckpt_path=None, monitor="loss", window=3, **kwargs):
    """The files that were chosen, with their values."""
    torch.manual_seed(0 if ckpt_path is None else 1)
    best = ModelCheckpoint(folder, "{epoch}-{step}", monitor=monitor, save_top_k=-1, every_n_train_steps=1)
    last = ModelCheckpoint(folder / "last", save_last=True, every_n_train_steps=1, enable_version_counter=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=3,
        accumulate_grad_batches=window,
        callbacks=[ExactResume(), best, last, OnExceptionCheckpoint(folder / "last", "failed")],
        **kwargs,
    )
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(20, 2, generator=generator))
    module = Net(fails_at)
    try:
        trainer.fit(module, DataLoader(data, 2, shuffle=True), DataLoader(data, 5), ckpt_path=ckpt_path)
    except Failure:
        assert fails_at is not None
    assert not {"state_dict", "load_state_dict", "_save_checkpoint"} & vars(best).keys()
    # "-v1" is of a file that the stopped run wrote behind its last checkpoint, and that is there already
    return {Path(path).name.replace("-v1", ""): float(value) for path, value in best.best_k_models.items()}


@pytest.mark.parametrize(
    "fails_at, saved", [*((batch, "last") for batch in (1, 4, 5, 6, 8)), (4, "failed")]
)  # by ModelCheckpoint at a step, or on the exception
@pytest.mark.parametrize("monitor, kwargs", [("loss", {}), ("val", dict(val_check_interval=2))], ids=str)
def test_the_files_chosen_are_those_of_one_run(tmp_path, fails_at, monitor, kwargs, saved):
    whole = fit(tmp_path / "whole", monitor=monitor, **kwargs)
    fit(tmp_path / "cut", fails_at, monitor=monitor, **kwargs)
    resumed = fit(tmp_path / "cut", ckpt_path=tmp_path / "cut" / "last" / f"{saved}.ckpt", monitor=monitor, **kwargs)
    assert len(whole) > 2
    assert resumed == whole


def test_a_file_of_this_state_is_resumed_by_lightning_alone(tmp_path):
    fit(tmp_path, 4)
    path = tmp_path / "last" / "last.ckpt"
    saver = ModelCheckpoint(tmp_path, "{epoch}-{step}", monitor="loss", save_top_k=2, every_n_train_steps=1)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[saver],
        max_epochs=2,
    )  # fmt: skip
    trainer.fit(Net(), DataLoader(TensorDataset(torch.ones(20, 2)), 2), ckpt_path=path)
    assert trainer.state.finished


def test_in_another_folder_it_saves_anew(tmp_path):
    fit(tmp_path / "first", 4)
    assert fit(tmp_path / "second", ckpt_path=tmp_path / "first" / "last" / "last.ckpt")
