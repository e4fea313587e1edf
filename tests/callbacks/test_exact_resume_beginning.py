# SPDX-License-Identifier: Apache-2.0
"""A run that goes on from a checkpoint of before its first batch is the whole run."""

from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_optkit.callbacks import ExactResume

pytestmark = pytest.mark.filterwarnings("ignore", "error:ExactResume")
DATA = torch.arange(12.0)[:, None] / 10


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch + torch.rand(1)).square().mean()

    def validation_step(self, batch, batch_idx):
        torch.rand(1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def save_in(hook, path):
    callback = pl.Callback()
    setattr(callback, hook, lambda trainer, *_: trainer.save_checkpoint(path))
    return callback


def fit(ckpt_path=None, callbacks=(), path=None, loader=None, **kwargs):
    torch.manual_seed(1 if ckpt_path is None else 2)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[ExactResume(), *callbacks],
        **{"max_epochs": 2, **kwargs},
    )
    module, validation = Net(), DataLoader(DATA, 6)
    trainer.fit(module, loader or DataLoader(DATA, 2, shuffle=True), validation, ckpt_path=ckpt_path)
    if path is not None:
        trainer.save_checkpoint(path)
    return module.net.weight.item()


@pytest.mark.parametrize("hook", ["on_fit_start", "on_sanity_check_end", "on_train_start", "on_train_epoch_start"])
@pytest.mark.parametrize("kwargs", [{}, dict(max_steps=8)], ids=str)
def test_saved_in_a_hook(tmp_path, hook, kwargs):
    if hook == "on_train_epoch_start":
        kwargs = {**kwargs, "max_epochs": 1}  # it saves in each
    whole = fit(callbacks=[save_in(hook, tmp_path / "saved.ckpt")], **kwargs)
    assert fit(tmp_path / "saved.ckpt", **kwargs) == whole


@pytest.mark.parametrize("is_known", [True, False], ids=["other data", "saved without it"])
def test_an_epoch_saved_in_its_first_hook_is_not_left_out(tmp_path, is_known):
    """Lightning counts it, and trains on no batch of it."""
    path, batches = tmp_path / "saved.ckpt", []
    fit(callbacks=[save_in("on_train_epoch_start", path)])  # in the second epoch
    if not is_known:
        saved = torch.load(path)
        del saved["callbacks"]["ExactResume"]
        torch.save(saved, path)
    counts = pl.Callback()
    counts.on_train_batch_end = lambda trainer, *_: batches.append(trainer.current_epoch)
    counts.on_train_epoch_start = lambda trainer, *_: batches.append("begins")
    with pytest.warns(UserWarning, match="it is not exact") if is_known else nullcontext():
        fit(path, [counts], loader=DataLoader(DATA, 2, shuffle=not is_known), max_epochs=3)
    num = len(DATA) // 2
    assert batches == ["begins", *[1] * num, "begins", *[2] * num]


@pytest.mark.parametrize("none", [dict(max_steps=0), dict(max_epochs=0), dict(max_time="00:00:00:00")], ids=str)
@pytest.mark.parametrize("kwargs", [{}, dict(max_steps=8)], ids=str)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_of_no_step(tmp_path, none, kwargs, workers):
    make = lambda: DataLoader(DATA, 2, shuffle=True, num_workers=workers)  # noqa: E731
    fit(path=tmp_path / "saved.ckpt", loader=make(), **none)
    assert fit(tmp_path / "saved.ckpt", loader=make(), **kwargs) == fit(loader=make(), **kwargs)


def test_generators_of_loaders(tmp_path):
    make = lambda seed: DataLoader(DATA, 2, shuffle=True, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    fit(path=tmp_path / "saved.ckpt", loader=make(3), max_steps=0)
    assert fit(tmp_path / "saved.ckpt", loader=make(4)) == fit(loader=make(3))


def test_seeds_that_are_not_known_yet_are_said(tmp_path):
    loader = DataLoader(DATA, 2, sampler=DistributedSampler(DATA, 1, 0))
    fit(callbacks=[save_in("on_fit_start", tmp_path / "saved.ckpt")], loader=loader)
    with pytest.raises(UserWarning, match=r"without the seeds of their samplers; .* is not exact\."):
        fit(tmp_path / "saved.ckpt", loader=loader)
