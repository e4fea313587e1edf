# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D102  (Lightning documents its hooks)
"""What usually stands around a module: torchmetrics, loggers, monitors, two optimizers stepped by hand."""

import tempfile
from typing import Any

import lightning.pytorch as pl
import torch
from _client import fits
from lightning.pytorch import callbacks, loggers
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score


def digits(**arguments: Any) -> DataLoader[Any]:
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    return DataLoader(TensorDataset(images.float() / 16, labels), batch_size=32, **arguments)


class Classifier(pl.LightningModule):
    """Metrics as objects, logged as the documentation of torchmetrics shows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
        metrics = MetricCollection([MulticlassAccuracy(10), MulticlassF1Score(10)])
        self.train_metrics, self.val_metrics = metrics.clone(prefix="train_"), metrics.clone(prefix="val_")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        self.train_metrics(logits, batch[1])
        self.log_dict(self.train_metrics)
        return nn.functional.cross_entropy(logits, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.val_metrics.update(logits, batch[1])
        self.log_dict(self.val_metrics)
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class Adversaries(pl.LightningModule):
    """Generator and discriminator, as in Lightning's GAN example, with a scheduler for each that it steps itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        real = batch[0]
        made = self.generator(torch.randn(len(real), 16).to(real))
        ones, zeros = torch.ones(len(real), 1).to(real), torch.zeros(len(real), 1).to(real)
        judge = nn.functional.binary_cross_entropy_with_logits
        for optimizer, loss in (
            (generator, lambda: judge(self.discriminator(made), ones)),
            (
                discriminator,
                lambda: judge(self.discriminator(real), ones) + judge(self.discriminator(made.detach()), zeros),
            ),
        ):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        made = [
            torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999))
            for net in (self.generator, self.discriminator)
        ]
        return made, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99) for optimizer in made]


def classifier() -> tuple[Any, dict[str, Any]]:
    return Classifier(), {"train_dataloaders": digits(shuffle=True, drop_last=True), "val_dataloaders": digits()}


def gan() -> tuple[Any, dict[str, Any]]:
    return Adversaries(), {"train_dataloaders": digits(shuffle=True)}


def monitored() -> list[pl.Callback]:
    return [callbacks.LearningRateMonitor("step"), callbacks.EarlyStopping("val_loss", patience=20)]


def in_csv(**arguments: Any) -> Any:
    return lambda variant, steps: fits(classifier, logger=loggers.CSVLogger(tempfile.mkdtemp()), **arguments)(
        variant, steps
    )


def in_tensorboard(variant: str, steps: int) -> Any:
    logger = loggers.TensorBoardLogger(tempfile.mkdtemp())
    return fits(classifier, logger=logger, callbacks=monitored, log_every_n_steps=1)(variant, steps)


CLIENTS = {
    "torchmetrics: collections, ReduceLROnPlateau": fits(classifier),
    "Lightning: CSVLogger, LearningRateMonitor, EarlyStopping": in_csv(callbacks=monitored, log_every_n_steps=1),
    "Lightning: GAN, two optimizers and schedulers stepped by hand": fits(gan),
}
try:
    import tensorboard  # noqa: F401
except ImportError:
    pass
else:
    CLIENTS["Lightning: TensorBoardLogger, LearningRateMonitor, EarlyStopping"] = in_tensorboard
