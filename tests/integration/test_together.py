# SPDX-License-Identifier: Apache-2.0
"""Many strategies in one run of an unchanged module: it trains, it resumes bit for bit, and the plan says so."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import (
    SAM,
    Augment,
    ExactResume,
    Fuse,
    GradientClipping,
    LabelSmoothing,
    LRSchedule,
    WeightAveraging,
)
from lightning_optkit.clipping import AutoClip, ClipNorm
from lightning_optkit.data import Mixup
from lightning_optkit.schedules import warmup_cosine


class Digits(pl.LightningModule):
    """A module that does not know of the strategies."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10)
            )

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())


def loaders():
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
    train, rest = torch.utils.data.random_split(data, [384, 1413], torch.Generator().manual_seed(0))
    validation = torch.utils.data.Subset(rest, range(256))
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(validation, batch_size=256)


def fit(module, folder, clip, fuses=True, epochs=3, ckpt_path=None, **kwargs):
    torch.manual_seed(1)
    fuse, averaging = Fuse(verbose=False), WeightAveraging(EMA(0.9))
    checkpoint = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=4)
    callbacks = [
        *([fuse] if fuses else []),
        GradientClipping(clip),
        LRSchedule(warmup_cosine(warmup=0.1), verbose=False),
        averaging,
        Augment(Mixup(0.2), seed=3),
        LabelSmoothing(0.1),
        SAM(0.05),
        ExactResume(),
        checkpoint,
    ]
    plans = []

    class Plans(pl.Callback):
        def on_train_batch_end(self, *_):
            plans[:] = [*map(str, fuse.explain()), averaging.explain()]

    trainer = pl.Trainer(
        callbacks=[*callbacks, Plans()],
        max_epochs=epochs,
        precision="bf16-mixed",
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
        **kwargs,
    )
    trainer.fit(module, *loaders(), ckpt_path=ckpt_path)
    return trainer, "\n".join(plans)


@pytest.mark.filterwarnings("ignore:You.re resuming")  # Lightning cannot know of ExactResume
@pytest.mark.parametrize("clip", [ClipNorm(0.5), AutoClip(30)], ids=["norm", "auto"])
def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_bit_for_bit(tmp_path, clip):
    expected, resumed = Digits(), Digits()
    trainer, plan = fit(expected, tmp_path, clip)
    assert trainer.global_step == 18
    assert trainer.callback_metrics["accuracy"] > 0.6  # of ten classes, after 18 steps
    fit(resumed, tmp_path, clip, ckpt_path=tmp_path / "step=8.ckpt")  # six steps an epoch
    for name, value in expected.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    for stage in ("norm", repr(clip), "update", "decay(0.01)", "EMA(decay=0.9"):
        assert stage in plan


def test_without_fuse_the_numbers_are_the_same(tmp_path):
    fused, plain = Digits(), Digits()
    fit(fused, tmp_path / "fused", ClipNorm(0.5), epochs=1)
    fit(plain, tmp_path / "plain", ClipNorm(0.5), fuses=False, epochs=1)
    torch.testing.assert_close(fused.state_dict(), plain.state_dict(), rtol=0, atol=2e-3)  # six steps in bf16
