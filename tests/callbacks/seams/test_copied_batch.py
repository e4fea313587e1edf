# SPDX-License-Identifier: Apache-2.0
"""A pass that measures gets a batch of its own: a `training_step` that changes its own trains on the same."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_optkit.callbacks import GradientHealth, NoiseScale
from lightning_optkit.callbacks.seams.copied_batch import copied_batch

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = dict(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
SMALL |= dict(enable_model_summary=False)


class Changing(pl.LightningModule):
    """Learns nothing, so that it is probed; normalizes its batch in place, and cleans its targets."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        batch[0].sub_(0.5).div_(2.0)
        batch[0] *= 1.1
        batch[1][batch[1] == 2] = 0
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(*callbacks):
    generator = torch.Generator().manual_seed(1)
    batches = [
        [torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)] for _ in range(16)
    ]  # the data set holds the batches themselves
    module = Changing()
    pl.Trainer(**SMALL, callbacks=list(callbacks)).fit(module, DataLoader(batches, batch_size=None))
    return module.net.weight.tolist(), [t.tolist() for batch in batches for t in batch]


@pytest.mark.parametrize("name", ["NoiseScale", "GradientHealth"])
def test_a_step_that_changes_its_batch_trains_on_the_same(name):
    callback = NoiseScale(every=3, verbose=False) if name == "NoiseScale" else GradientHealth(4, verbose=False)
    assert fit(callback) == fit()


Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    names: list


class Graph:
    def __init__(self, x):
        self.x = x

    def clone(self):
        return Graph(self.x.clone())


def test_nothing_of_a_copy_is_shared():
    x = torch.zeros(4)
    batch = {
        "pair": Pair(x, x[2:]), "record": Record(x, ["a"]), "user": UserDict(x=x), "graph": Graph(x),
        "array": np.zeros(2), "text": "a", "list": [x], "leaf": torch.zeros(1, requires_grad=True),
    }  # fmt: skip
    copied = copied_batch(batch)
    assert type(copied["pair"]) is Pair and type(copied["user"]) is UserDict and copied["leaf"].requires_grad
    assert copied["pair"].x is copied["list"][0] is copied["user"]["x"] is copied["record"].x
    copied["pair"].x.add_(1)
    copied["pair"].y.add_(1)
    copied["graph"].x.add_(1)
    copied["array"] += 1
    copied["record"].names.append("b")
    copied["user"].pop("x")
    copied.pop("text")
    assert not x.any() and not batch["array"].any() and batch["record"].names == ["a"]
    assert "x" in batch["user"] and batch["text"] == "a"
    reader = iter([1])
    assert copied_batch(reader) is reader
