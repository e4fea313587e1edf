# SPDX-License-Identifier: Apache-2.0
"""A fit of which nothing could be trained ends with a sentence and a status, and is no run of a comparison."""

import pytest
import yaml

from lightning_optkit.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")

USER = """
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

class Nothing(IterableDataset):
    def __iter__(self):
        return iter(())

DATA = {
    "empty": lambda: DataLoader(TensorDataset(torch.ones(0, 4)), batch_size=8),
    "stream": lambda: DataLoader(Nothing(), batch_size=8),
    "too few": lambda: DataLoader(TensorDataset(torch.ones(5, 4)), batch_size=8, drop_last=True),
    "list": lambda: [],
    "some": lambda: DataLoader(TensorDataset(torch.ones(16, 4)), batch_size=8),
}

class Net(pl.LightningModule):
    def __init__(self, data: str = "some", has_loss: bool = True):
        super().__init__()
        self.net, self.data, self.has_loss = nn.Linear(4, 2), data, has_loss

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).pow(2).mean()
        return loss if self.has_loss else None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DATA[self.data]()
"""
EMPTY = "the training data are empty."
REASONS = {
    "empty": EMPTY,
    "stream": EMPTY,
    "too few": "of 5 samples of the training data there is no whole batch of 8 (drop_last).",
    "list": EMPTY,
}


@pytest.fixture
def optkit(tmp_path, users_net):
    """A command with the configuration of a user, in the user's folder."""
    users_net(USER)
    quiet = dict(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    content = {"seed_everything": 1, "model": {"class_path": "users_net.Net"}, "trainer": quiet}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return lambda *words: main([*words])


@pytest.mark.parametrize("data", REASONS)
def test_a_fit_without_a_batch_is_refused(optkit, capsys, data):
    with pytest.raises(SystemExit, match=r"^2$"):
        optkit("fit", "--config=run.yaml", f"--model.data={data}")
    assert capsys.readouterr().err.endswith(f"optkit fit: data: nothing was trained: {REASONS[data]}\n")


@pytest.mark.parametrize(
    "word", ["--model.has_loss=false", "--trainer.limit_train_batches=0", "--trainer.max_epochs=0"]
)
def test_a_fit_that_was_not_to_train_is_let_be(optkit, word):
    optkit("fit", "--config=run.yaml", word)


SETTINGS = {
    f"model: {{class_path: users_net.Net, init_args: {{data: {data}}}}}": said for data, said in REASONS.items()
}
SETTINGS["trainer: {max_epochs: 0}"] = "its length is 0."


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_without_a_step_is_none_of_a_comparison(optkit, tmp_path, capsys, setting):
    (tmp_path / "none.yaml").write_text(setting)
    with pytest.raises(SystemExit, match=r"^2$"):
        optkit("compare", "--task", "run.yaml", "--tried", "none.yaml", "--seeds", "1", "2")
    out, said = capsys.readouterr()
    assert said.startswith(f"optkit compare: none.yaml, seed 1: it took no step: {SETTINGS[setting]}\n")
    assert "as it is, seed 2: 2 steps" in out and "none.yaml, seed" not in out
    assert (tmp_path / "compared.html").exists()
