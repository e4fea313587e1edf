# SPDX-License-Identifier: Apache-2.0
"""A file of ModelCheckpoint has what the module's own hooks did at the end of the batch or validation of its save."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import ExactResume

pytestmark = pytest.mark.filterwarnings("ignore")


class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(2, 1)
        for name in ("average", "batches", "validations"):
            self.register_buffer(name, torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.net(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Own(Plain):
    """Averages its bias, and counts."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.average.mul_(0.9).add_(self.net.bias.detach(), alpha=0.1)
        self.batches += 1

    def on_validation_end(self):
        if not self.trainer.sanity_checking:
            self.validations += 1


def fit(saver, make=Own, ckpt_path=None, **kwargs):
    torch.manual_seed(0 if ckpt_path is None else 1)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=3,
        callbacks=[ExactResume(), saver],
        **kwargs,
    )
    module, data = make(), TensorDataset(torch.linspace(-1, 1, 20).view(-1, 2))
    trainer.fit(module, DataLoader(data, 2, shuffle=True), DataLoader(data, 5), ckpt_path=ckpt_path)
    return module


WHEN = {
    "batches": dict(every_n_train_steps=1),
    "validations": dict(monitor="val", every_n_epochs=1, save_on_train_epoch_end=False),
}


@pytest.mark.parametrize("kwargs", [{}, dict(accumulate_grad_batches=2), dict(val_check_interval=2)], ids=str)
@pytest.mark.parametrize("when", WHEN)
def test_it_has_what_the_module_did_after_it(tmp_path, when, kwargs):
    folder = tmp_path / "files"
    whole = fit(ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **WHEN[when]), **kwargs)
    files = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) >= 3
    for path in files[:-1][:: max(1, len(files) // 5)]:
        resumed = fit(ModelCheckpoint(tmp_path / "others", **WHEN[when]), ckpt_path=path, **kwargs)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), f"{name}, from {path.name}"


def test_nothing_is_left_behind_and_a_copy_of_the_module_is_whole(tmp_path):
    copies = []

    class Copies(Own):
        def on_train_start(self):
            copies.append(copy.deepcopy(self))

    saver = ModelCheckpoint(tmp_path)
    module = fit(saver, Copies)
    assert len(copies) == 1
    for owner in (module, saver):
        assert not {"on_train_batch_end", "on_validation_end"} & vars(owner).keys()


def test_a_module_without_these_hooks_is_left_alone(tmp_path):
    seen = []

    class Looks(ModelCheckpoint):
        def on_train_start(self, trainer, pl_module):
            seen.extend([*vars(self), *vars(pl_module)])
            super().on_train_start(trainer, pl_module)

    fit(Looks(tmp_path), Plain)
    assert seen
    assert not {"on_train_batch_end", "on_validation_end"} & {*seen}


def test_a_module_that_fails_is_not_saved(tmp_path):
    class Fails(Own):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("of the module")

    with pytest.raises(RuntimeError, match="of the module"):
        fit(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1), Fails)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=1.ckpt"]
