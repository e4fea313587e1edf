# SPDX-License-Identifier: Apache-2.0
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_optkit.callbacks import GradientHealth

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        if isinstance(batch, list | tuple) and len(batch) == 2:
            return F.cross_entropy(self.layer(batch[0].float().reshape(-1, 8)), batch[1].reshape(-1))
        return F.cross_entropy(self.layer(X), Y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Items(Dataset):
    """Each item is of another place, or all are of the first; each reading of one draws a number."""

    def __init__(self, make, is_one):
        self.make, self.is_one = make, is_one

    def __len__(self):
        return 64

    def __getitem__(self, place):
        torch.rand(1), np.random.rand()
        return self.make(0 if self.is_one else place)


class Zeros(IterableDataset):
    def __len__(self):
        return 64

    def __iter__(self):
        return iter(torch.zeros(64, 1))


class First:
    """The fault: a new iterator at every step."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return (next(iter(self.loader)) for _ in range(len(self)))

    def __len__(self):
        return len(self.loader)


MEANT = {
    "zeros": lambda: DataLoader(TensorDataset(torch.zeros(64, 1)), 8),
    "iterable zeros": lambda: DataLoader(Zeros(), 8),
    "the whole set": lambda: DataLoader(Items(lambda i: (X, Y), True), batch_size=None),
    "the whole set as a batch of one": lambda: DataLoader([(X, Y)] * 16, 1),
    "arrays": lambda: DataLoader(Items(lambda i: (X.numpy(), Y.numpy()), True), 1),
    "two loaders": lambda: {"a": DataLoader([(X, Y)] * 16, 1), "b": DataLoader([X] * 16, 1)},
}
FAULTY = {
    "a new iterator": lambda: First(DataLoader(TensorDataset(X, Y), 8)),
    "a sampler": lambda: DataLoader(TensorDataset(X, Y), 1, sampler=[3] * 16),
    "a sample": lambda: DataLoader(TensorDataset(X, Y), 8, sampler=[3] * 64),
    "a batch sampler": lambda: DataLoader(TensorDataset(X, Y), batch_sampler=[[1, 2]] * 16),
    "one of two": lambda: {"a": DataLoader([(X, Y)] * 16, 1), "b": DataLoader(TensorDataset(X), 1, sampler=[3] * 16)},
}


def diagnosed(loader, watched=True):
    health, module = GradientHealth(check_every=50, verbose=False), Classifier()
    trainer = pl.Trainer(
        callbacks=[health] if watched else [], max_epochs=1, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    torch.manual_seed(0)
    np.random.seed(0)
    trainer.fit(module, loader)
    assert not health._guard.failed
    return [verdict.symptom for verdict in health.verdicts]


@pytest.mark.parametrize("kind", MEANT)
def test_batches_of_equal_items_are_meant(kind):
    assert "duplicate_data" not in diagnosed(MEANT[kind]())


@pytest.mark.parametrize("kind", FAULTY)
def test_equal_batches_of_items_that_differ_are_named(kind):
    assert "duplicate_data" in diagnosed(FAULTY[kind]())


def test_the_look_draws_no_number_of_the_run():
    drawn = []
    for watched in (False, True):
        diagnosed(DataLoader(Items(lambda i: (X, Y), True), batch_size=None), watched)
        drawn.append((torch.rand(1).item(), np.random.rand()))
    assert drawn[0] == drawn[1]
