# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D101, D102  (Lightning documents its hooks)
"""The modules of `lightning.pytorch.demos`, as they are, under both names of Lightning."""

import os
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _client import fits, python_text
from lightning.pytorch.demos import boring_classes as boring
from lightning.pytorch.demos.lstm import LightningLSTM, SequenceSampler
from lightning.pytorch.demos.mnist_datamodule import MNISTDataModule
from lightning.pytorch.demos.transformer import LightningTransformer, WikiText2
from torch import Tensor, nn
from torch.utils.data import DataLoader

Made = tuple[pl.LightningModule, dict[str, Any]]


def words() -> WikiText2:
    """The demo's data set over words of Python's library; it reads a file that would be downloaded."""
    folder = Path(tempfile.mkdtemp())
    (folder / "wikitext-2.txt").write_text(python_text(15_000))
    return WikiText2(folder, download=False)


class OnWords:
    """The demos download a text; this one is there."""

    def prepare_data(self) -> None:
        pass


class TransformerOnWords(OnWords, LightningTransformer):
    pass


class LSTMOnWords(OnWords, LightningLSTM):
    pass


def transformer() -> Made:
    data = words()
    return TransformerOnWords(data.vocab_size), {"train_dataloaders": DataLoader(data, batch_size=4)}


def lstm() -> Made:
    data = words()
    sampler = SequenceSampler(data, batch_size=20)
    return LSTMOnWords(data.vocab_size), {"train_dataloaders": DataLoader(data, batch_sampler=sampler)}


class Digits(pl.LightningModule):
    """The demos' network for MNIST, trained as in Lightning's image classifier example."""

    def __init__(self) -> None:
        super().__init__()
        self.model = boring.Net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.nll_loss(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self.model(batch[0]).argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adadelta(self.model.parameters(), lr=1.0)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)]


def mnist() -> Made:
    """Its data module looks for files before it downloads them: these hold scikit-learn's digits, 28 x 28."""
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = nn.functional.interpolate(images.float().view(-1, 1, 8, 8) * 16, size=28)[:, 0]
    folder = Path(tempfile.mkdtemp())
    (folder / "MNIST" / "complete").mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        torch.save((images, labels), folder / "MNIST" / "complete" / name)
    os.environ["PL_USE_MOCKED_MNIST"] = "1"
    return Digits(), {"datamodule": MNISTDataModule(str(folder), val_split=300, num_workers=0)}


def boring_model() -> Made:
    return boring.BoringModel(), {}


def under_the_other_name() -> tuple[Any, dict[str, Any]]:
    from pytorch_lightning.demos.boring_classes import BoringModel

    return BoringModel(), {}


def _other_name() -> Any:
    import pytorch_lightning

    return pytorch_lightning


def demo_model() -> Made:
    return boring.DemoModel(out_dim=2), {"datamodule": boring.BoringDataModule()}


def without_length() -> Made:
    return boring.BoringModel(), {"datamodule": boring.BoringDataModuleNoLen()}


def manual() -> Made:
    return boring.ManualOptimBoringModel(), {}


class TwoLoaders(boring.BoringModel):
    """A batch of each of the loaders of `IterableBoringDataModule`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": sum(self.step(part) for part in batch)}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"x": self.step(batch)}


def two_loaders() -> Made:
    return TwoLoaders(), {"datamodule": boring.IterableBoringDataModule()}


CLIENTS = {
    "lightning.pytorch.demos: BoringModel": fits(boring_model),
    "pytorch_lightning.demos: BoringModel": fits(under_the_other_name, _other_name()),
    "lightning.pytorch.demos: ManualOptimBoringModel": fits(manual),
    "lightning.pytorch.demos: DemoModel, BoringDataModule": fits(demo_model),
    "lightning.pytorch.demos: BoringModel, loaders without a length": fits(without_length),
    "lightning.pytorch.demos: BoringModel, IterableBoringDataModule": fits(two_loaders),
    "lightning.pytorch.demos: LightningTransformer": fits(transformer),
    "lightning.pytorch.demos: LightningLSTM": fits(lstm),
    "lightning.pytorch.demos: Net, MNISTDataModule, Adadelta and StepLR": fits(mnist),
}
