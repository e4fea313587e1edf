# SPDX-License-Identifier: Apache-2.0
"""docs/finders.md runs as it stands, and finds something."""

import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.integration.test_docs import examples

PAGE = Path(__file__).parents[2] / "docs" / "finders.md"


class Digits(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x).float() / 16, torch.tensor(y))
    names = {"module": Digits(), "train": DataLoader(data, batch_size=32, shuffle=True)}
    for example in examples(PAGE):
        exec(compile(example, str(PAGE), "exec"), names)
    assert all(1e-5 < rate < 1 for rate in names["finder"].result.suggestions.values())
    low, high = names["noise"].interval
    assert 0 < low <= names["noise"].scale <= high and math.isfinite(names["noise"].scale)
    assert len(names["study"].trials) == 5 and names["study"].best_value < 2.3  # by chance: 2.3
    assert names["guard"].events == []
