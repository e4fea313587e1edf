# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D101, D102  (Lightning documents its hooks)
"""Every recipe on real data that is installed already, beside the same run without it; the table is what it prints.

    python examples/recipes.py [mlp cnn transformer finetune gan selfsupervised timeseries] [--fast]

Data: scikit-learn's diabetes and digits, the text of Python's own library, and the prices that matplotlib brings. The
modules are of a user's own: only `train` below knows of lightning_optkit.
"""

import argparse
import copy
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import cbook
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optkit as ok

SEED = 1


def split(*tensors: Tensor, batch_size: int, share: float = 0.75) -> tuple[DataLoader, DataLoader]:
    """Loaders over a part for training and the rest, in a random order that is always the same."""
    order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(0))
    parts = order.split([int(share * len(order)), len(order) - int(share * len(order))])
    train, rest = (TensorDataset(*[tensor[part] for tensor in tensors]) for part in parts)
    return DataLoader(train, batch_size, shuffle=True, drop_last=True), DataLoader(rest, 512)


class Supervised(pl.LightningModule):
    """A network, its loss, and an optimizer of torch."""

    def __init__(self, net: nn.Module, loss: Callable[..., Tensor], lr: float, **adamw: Any) -> None:
        super().__init__()
        self.net, self.loss, self.lr, self.adamw = net, loss, lr, adamw

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", self.loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, **self.adamw)


# --- the runs: a module, its loaders, and how many steps ---


def mlp() -> tuple[pl.LightningModule, DataLoader, DataLoader, int]:
    """Diabetes in the units of the study, with a tenth of the values gone; targets of variance 1."""
    table, target = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True, scaled=False))
    table[torch.rand(table.shape, generator=torch.Generator().manual_seed(0)) < 0.1] = torch.nan
    target = ((target - target.mean()) / target.std()).unsqueeze(1)
    net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    return Supervised(net, F.mse_loss, lr=1e-3), *split(table, target, batch_size=32), 300


def digits() -> tuple[Tensor, Tensor]:
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    return images.float().view(-1, 1, 8, 8) / 16, labels


def convolutional(width: int = 24) -> nn.Sequential:
    def block(before: int, after: int, stride: int) -> nn.Sequential:
        convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())

    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(block(1, width, 1), block(width, 2 * width, 2), block(2 * width, 4 * width, 2), pooled)


class Images(Supervised):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])  # as a call of torch's, which recipes can reach

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", (self(batch[0]).argmax(dim=1) != batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, nesterov=True)


class FineTuned(Images):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def cnn() -> tuple[pl.LightningModule, DataLoader, DataLoader, int]:
    """300 images of handwritten digits."""
    net = nn.Sequential(convolutional(), nn.Linear(96, 10))
    return Images(net, F.cross_entropy, lr=0.05), *split(*digits(), batch_size=50, share=1 / 6), 400


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.norm2(x))


class Language(nn.Module):
    def __init__(self, length: int, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(128, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, heads=4) for _ in range(depth)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 128))

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device)
        logits: Tensor = self.head(self.blocks(self.characters(text) + self.positions(places)))
        return logits.transpose(1, 2)  # (N, characters, length)


def transformer() -> tuple[pl.LightningModule, DataLoader, DataLoader, int]:
    """The next character of Python's own library."""
    length = 64
    text = "".join(path.read_text() for path in sorted(Path(argparse.__file__).parent.glob("a*.py")))
    ids = torch.tensor([min(ord(letter), 127) for letter in text])
    windows = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)
    module = Supervised(Language(length), F.cross_entropy, lr=2e-2, betas=(0.9, 0.95))
    return module, *split(windows[:, :-1], windows[:, 1:], batch_size=32, share=0.9), 400


def finetune() -> tuple[pl.LightningModule, DataLoader, DataLoader, int]:
    """100 images of the digits 5 to 9, for a network that knows 0 to 4."""
    images, labels = digits()
    torch.manual_seed(SEED)
    body, known = convolutional(), labels < 5
    pretrained = Images(nn.Sequential(body, nn.Linear(96, 5)), F.cross_entropy, lr=0.05)
    trainer(300, []).fit(pretrained, split(images[known], labels[known], batch_size=64)[0])
    module = FineTuned(nn.Sequential(copy.deepcopy(body), nn.Linear(96, 5)), F.cross_entropy, lr=3e-3)
    return module, *split(images[~known], labels[~known] - 5, batch_size=20, share=0.112), 100


class GAN(pl.LightningModule):
    def __init__(self, real: Tensor) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(16, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(),
            nn.Linear(128, 64), nn.Sigmoid(),
        )  # fmt: skip
        self.critic = nn.Sequential(
            nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)
        )
        self.register_buffer("real", real, persistent=False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        of_generator, of_critic = self.optimizers()
        real = batch[0].flatten(1)
        drawn = self.generator(torch.randn(len(real), 16, device=self.device))
        loss = F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(drawn.detach())).mean()
        of_critic.zero_grad()
        self.manual_backward(loss)
        of_critic.step()
        loss = F.softplus(-self.critic(drawn)).mean()
        of_generator.zero_grad()
        self.manual_backward(loss)
        of_generator.step()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """How far images drawn are from those held out: energy distance, 0 for the same distribution."""
        noise = torch.randn(len(batch[0]), 16, generator=torch.Generator().manual_seed(0))
        drawn, real = self.generator(noise.to(self.device)), batch[0].flatten(1)
        apart = 2 * torch.cdist(drawn, real).mean() - torch.cdist(drawn, drawn).mean() - torch.cdist(real, real).mean()
        self.log("loss", apart)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        of_generator, of_critic = (
            torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in (self.generator, self.critic)
        )
        return of_generator, of_critic


def gan() -> tuple[pl.LightningModule, DataLoader, DataLoader, int]:
    """Digits from noise; a batch is two steps."""
    images, labels = digits()
    return GAN(images), *split(images, labels, batch_size=64), 2 * 3000


class Contrastive(pl.LightningModule):
    """Two noisy, shifted views of an image should be nearer to each other than to those of other images."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = convolutional()
        self.projector = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32))
        self.crop = ok.RandomCrop(8, padding=1)

    def view(self, images: Tensor) -> Tensor:
        moved: Tensor = self.crop(images)
        embedded: Tensor = F.normalize(self.projector(self.encoder(moved + 0.1 * torch.randn_like(moved))), dim=1)
        return embedded

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self.view(batch[0]) @ self.view(batch[0]).T / 0.2
        return F.cross_entropy(logits, torch.arange(len(logits), device=self.device))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Share of held-out images whose nearest neighbor among them, without its label, is another digit."""
        embedded = F.normalize(self.encoder(batch[0]), dim=1)
        nearest = (embedded @ embedded.T).fill_diagonal_(-1).argmax(dim=1)
        self.log("loss", (batch[1][nearest] != batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def selfsupervised() -> tuple[pl.LightningModule, DataLoader, DataLoader, int]:
    return Contrastive(), *split(*digits(), batch_size=128), 300


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 32, batch_first=True), nn.Linear(32, 1)

    def forward(self, windows: Tensor) -> Tensor:
        predicted: Tensor = self.head(self.lstm(windows)[0][:, -1])
        return predicted


def timeseries() -> tuple[pl.LightningModule, DataLoader, DataLoader, int]:
    """Tomorrow's volume of a stock, in logarithms of variance 1, from price changes and volumes of 30 days."""
    rows = cbook.get_sample_data("goog.npz")["price_data"]
    volume, change = np.log(rows["volume"][1:]), 100 * np.diff(np.log(rows["adj_close"]))
    series = torch.tensor(np.stack([change, volume], axis=1), dtype=torch.float32)
    windows = series.unfold(0, 30, 1)[:-1].transpose(1, 2)
    target = ((series[30:, 1] - series[:, 1].mean()) / series[:, 1].std()).unsqueeze(1)
    train = TensorDataset(windows[:750], target[:750])
    rest = TensorDataset(windows[750:], target[750:])
    module = Supervised(Recurrent(), F.mse_loss, lr=3e-3)
    return module, DataLoader(train, 32, shuffle=True, drop_last=True), DataLoader(rest, 512), 300


RUNS = {run.__name__: run for run in (mlp, cnn, transformer, finetune, gan, selfsupervised, timeseries)}
MEASURES = {
    "mlp": "mean squared error", "cnn": "share wrong", "transformer": "cross-entropy", "finetune": "share wrong",
    "gan": "energy distance", "selfsupervised": "nearest neighbor wrong", "timeseries": "mean squared error",
}  # fmt: skip


# --- the two ways to train ---


class FillGaps(pl.Callback):
    """What a run without a recipe needs for a table with gaps: zeros in their place."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: list[Tensor], batch_idx: int) -> None:
        batch[0].nan_to_num_()

    on_validation_batch_start = on_train_batch_start


def trainer(max_steps: int, callbacks: list[pl.Callback]) -> pl.Trainer:
    return pl.Trainer(
        max_steps=max_steps, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip


def train(name: str, with_recipe: bool, fast: bool = False) -> tuple[float, float]:
    """What the run reaches on data it has not seen, and its seconds."""
    torch.manual_seed(SEED)
    module, training, validation, steps = RUNS[name]()
    pl.seed_everything(SEED, verbose=False)
    callbacks: list[pl.Callback] = ok.recipe(name) if with_recipe else [FillGaps()] if name == "mlp" else []
    runner = trainer(steps // 10 if fast else steps, callbacks)
    started = time.perf_counter()
    runner.fit(module, training)
    seconds = time.perf_counter() - started
    runner.limit_val_batches = 1.0
    (measured,) = runner.validate(module, validation, verbose=False)
    return measured["loss"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="recipes; all of them by default")
    parser.add_argument("--fast", action="store_true", help="a tenth of the steps")
    options = parser.parse_args()
    if unknown := {*options.names} - {*RUNS}:
        parser.error(f"no recipe {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    for name in ("lightning.pytorch", "lightning_utilities.core.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    table = Table("recipe", "on held-out data", "without", "with", "seconds without", "with", box=box.SIMPLE_HEAD)
    for name in options.names or RUNS:
        (without, before), (with_it, after) = (train(name, use, options.fast) for use in (False, True))
        table.add_row(name, MEASURES[name], f"{without:.3g}", f"{with_it:.3g}", f"{before:.1f}", f"{after:.1f}")
    Console(highlight=False, markup=False).print(table)


if __name__ == "__main__":
    main()
