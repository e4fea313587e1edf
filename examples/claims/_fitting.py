# SPDX-License-Identifier: Apache-2.0
"""What the claims on regularization share: a network with dropout, fitted by a real Trainer on few digits."""

import logging
import warnings
from collections.abc import Sequence

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from _common import split
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_optkit.data import Standardize

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def few_digits(seed: int, examples: int = 200) -> Data:
    """Train and test inputs and labels: so few examples that a network can learn them by heart."""
    x_train, x_test, y_train, y_test = split("digits", seed)
    x_train, y_train = x_train[:examples], y_train[:examples]
    scale = Standardize().fit(x_train)
    return scale(x_train).float(), scale(x_test).float(), y_train, y_test


class Batches:
    """An iterable of shuffled batches; faster than a DataLoader on so little data."""

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, seed: int) -> None:
        self.x, self.y, self.batch_size = x, y, batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def __iter__(self):  # type: ignore[no-untyped-def]
        for rows in torch.randperm(len(self.x), generator=self.generator).split(self.batch_size):
            yield self.x[rows], self.y[rows]


class Classifier(pl.LightningModule):
    """A two-layer network; nothing in it knows of the callbacks."""

    def __init__(self, seed: int, dropout: float = 0.0, width: int = 128, weight_decay: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.ReLU(),
            nn.Dropout(dropout), nn.Linear(width, 10),
        )  # fmt: skip
        self.weight_decay = weight_decay

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=self.weight_decay)


def fit(
    module: Classifier, data: Data, callbacks: Sequence[Callback], *, epochs: int, seed: int, validate: bool = False
) -> Classifier:
    """The module after `epochs` of batches of 50, in evaluation mode."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    x_train, x_test, y_train, y_test = data
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=1.0 if validate else 0,
    )  # fmt: skip
    trainer.fit(module, Batches(x_train, y_train, 50, seed), Batches(x_test, y_test, 450, seed))
    return module.eval()


@torch.no_grad()
def accuracy(module: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    return float((module(x).argmax(dim=1) == y).double().mean())


@torch.no_grad()
def loss(module: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean cross entropy."""
    return float(F.cross_entropy(module(x), y))


def mean_and_range(values: Sequence[float], form: str = ".1%") -> str:
    """For a table: the mean, and the smallest and largest."""
    mean = sum(values) / len(values)
    return f"{mean:{form}} ({min(values):{form}} to {max(values):{form}})"
