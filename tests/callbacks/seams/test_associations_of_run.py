# SPDX-License-Identifier: Apache-2.0
"""Which batches are watched: those that were not trained on, right before the first validation, and that validation."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import GradientHealth


class Linear(pl.LightningModule):
    """Logs nothing, so that the seam alone tells of its validation."""

    def __init__(self):
        super().__init__()
        self.layer, self.watched = torch.nn.Linear(2, 1), []

    def training_step(self, batch, batch_idx):
        self.watched += [(self.current_epoch, batch_idx)] * (torch.overrides._len_torch_function_stack() > 0)
        return F.mse_loss(self.layer(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.mse_loss(self.layer(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def loader(batches):
    x = torch.randn(4 * batches, 2, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :1]), 4)


class Seen(pl.Callback):
    """Keeps what was seen: it is forgotten after the fit."""

    def on_train_end(self, trainer, pl_module):
        (health,) = [each for each in trainer.callbacks if isinstance(each, GradientHealth)]
        self.fresh, self.held = health._seen.fresh, health._seen.held


@pytest.mark.parametrize(
    ("batches", "settings", "expected"),
    [
        (10, {}, [5, 6, 7, 8, 9]),
        (10, {"val_check_interval": 4}, [2, 3]),
        (200, {}, [*range(100, 200, 3)]),
        (10, {"check_val_every_n_epoch": 2}, [5, 6, 7, 8, 9]),
        (10, {"limit_val_batches": 0}, [5, 6, 7, 8, 9]),
        (1, {}, []),
    ],
)
def test_batches_before_the_first_validation(make_trainer, monkeypatch, batches, settings, expected):
    monkeypatch.setattr("lightning_optkit.callbacks.seams.measured_when._FIRST", ())
    module, kept = Linear(), Seen()
    health = GradientHealth(check_every=1000, verbose=False, probe=False)
    settings = {"limit_val_batches": 1.0, "accumulate_grad_batches": 1, **settings}
    trainer = make_trainer(health, kept, epochs=3, num_sanity_val_steps=2, **settings)
    trainer.fit(module, loader(batches), loader(2))
    assert [idx for epoch, idx in module.watched if epoch == 0 and idx] == expected and not {
        epoch for epoch, idx in module.watched if epoch and idx
    }
    is_known = not {*settings} & {"check_val_every_n_epoch"} and settings["limit_val_batches"] and batches > 1
    assert (kept.fresh is not None and kept.held is not None) == bool(is_known)
    if is_known:
        assert kept.fresh.samples == 4 * len(expected) and kept.held.samples == 8
    assert "training_step" not in vars(module) and "validation_step" not in vars(module)


def test_a_batch_that_is_run_again_counts_once(make_trainer):
    module, kept = Linear(), Seen()
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters(), 0.01, max_iter=3)
    health = GradientHealth(check_every=1000, verbose=False, probe=False)
    trainer = make_trainer(health, kept, epochs=1, limit_val_batches=1.0, accumulate_grad_batches=1)
    trainer.fit(module, loader(10), loader(2))
    assert kept.fresh.samples == 4 * 5 and kept.fresh.batches == 5
