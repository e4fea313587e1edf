# SPDX-License-Identifier: Apache-2.0
"""Small networks that learn real data well within about 200 steps, and all that a fault may change about them.

Every network is `head(body(x))`. `HELD_OUT` families were set apart before any rule was written, and are not looked at
while rules are tuned.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.diagnostics.benchmark import data


@dataclass
class Setup:
    """A run before it starts; faults and traps change it in place."""

    family: str
    seed: int
    body: nn.Module
    head: nn.Module
    data: tuple[Tensor, Tensor, Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    kind: str  # "classes", "binary" or "regression": how outputs are scored
    lrs: tuple[float, float]  # Adam's, SGD's
    epochs: int
    batch_size: int = 64
    forward: Callable[[nn.Module, nn.Module, Tensor], Tensor] = lambda body, head, x: head(body(x))
    optimizer: str = "adamw"
    stages: dict[str, Any] = field(default_factory=dict)  # arguments of an optimizer of this package
    lr_factor: float = 1.0
    weight_decay: float = 0.01
    optimized: Callable[[nn.Module], Any] = lambda module: module.parameters()
    schedule: Callable[[Any, int, int], Any] | None = None  # (optimizer, steps, epochs) -> configuration
    manual: bool = False
    manual_zero: Callable[[Any], object] | None = None
    zeroes: bool = True
    steps_scheduler: bool = False  # training_step steps it too
    target: Callable[[Tensor], Tensor] = lambda y: y
    sampler: Callable[[Tensor], Any] | None = None  # of the targets; without, in random order
    callbacks: list[Any] = field(default_factory=list)
    trainer: dict[str, Any] = field(default_factory=dict)
    at_start: Callable[[nn.Module], object] | None = None  # called with the module as training starts
    prepare: Callable[["Setup"], object] | None = None  # called before the run: pretraining

    @property
    def lr(self) -> float:
        return self.lrs[1 if self.optimizer.startswith("sgd") else 0] * self.lr_factor

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.data[0]) // self.batch_size)


def _layers(sizes, activation, norm=None):
    found = []
    for before, after in pairwise(sizes):
        found += [nn.Linear(before, after), *([norm(after)] if norm else []), activation()]
    return nn.Sequential(*found)


def _classes(seed, family, body, head, data_, lrs, epochs, **kwargs):
    return Setup(family, seed, body, head, data_, F.cross_entropy, "classes", lrs, epochs, **kwargs)


def mlp(seed):
    return _classes(seed, "mlp", _layers([64, 64, 64], nn.ReLU), nn.Linear(64, 10), data.digits(seed), (3e-3, 0.05), 8)


def tanh_mlp(seed):
    body = _layers([64, 48, 48, 48], nn.Tanh)
    return _classes(seed, "tanh_mlp", body, nn.Linear(48, 10), data.digits(seed), (3e-3, 0.05), 8)


def deep_mlp(seed):
    body = _layers([64] + [48] * 8, nn.ReLU)
    for layer in body:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return _classes(seed, "deep_mlp", body, nn.Linear(48, 10), data.digits(seed), (1e-3, 0.01), 9)


def cnn(seed):
    body = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 24, 3, stride=2), nn.ReLU(), nn.Flatten()
    )  # fmt: skip
    return _classes(seed, "cnn", body, nn.Linear(216, 10), data.digits(seed, (1, 8, 8)), (3e-3, 0.05), 7)


def bn_cnn(seed):
    body = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten(),
    )  # fmt: skip
    return _classes(seed, "bn_cnn", body, nn.Linear(216, 10), data.digits(seed, (1, 8, 8)), (3e-3, 0.05), 7)


class _Last(nn.Module):
    """The last output of a recurrent layer over the rows of an image."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0][:, -1]


def lstm(seed):
    body = _Last(nn.LSTM(8, 48, batch_first=True))
    return _classes(seed, "lstm", body, nn.Linear(48, 10), data.digits(seed, (8, 8)), (5e-3, 0.3), 10)


class _Tokens(nn.Module):
    def __init__(self, width=32, depth=2):
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(0.02 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(self.blocks(self.embed(x) + self.place)).mean(1)


def transformer(seed):
    return _classes(
        seed, "transformer", _Tokens(), nn.Linear(32, 10), data.digits(seed, (8, 8)), (3e-3, 0.1), 8
    )  # fmt: skip


def regression(seed):
    x, y, x_val, y_val = data.split("diabetes", seed)
    mean, std = y.mean(), y.std()
    y, y_val = ((each - mean).float() / std for each in (y, y_val))
    body, head = _layers([10, 32, 32], nn.ReLU), nn.Sequential(nn.Linear(32, 1), nn.Flatten(0))
    return Setup(
        "regression", seed, body, head, (x, y, x_val, y_val), F.mse_loss, "regression", (3e-3, 0.02), 20, 32
    )  # fmt: skip


def logistic(seed):
    x, y, x_val, y_val = data.split("breast_cancer", seed)
    head = nn.Sequential(nn.Linear(30, 1), nn.Flatten(0))
    loss = F.binary_cross_entropy_with_logits
    return Setup(
        "logistic", seed, nn.Identity(), head, (x, y.float(), x_val, y_val.float()), loss, "binary", (2e-2, 0.1), 15, 32
    )  # fmt: skip


def wine(seed):
    body = _layers([13, 32, 32], nn.GELU)
    return _classes(seed, "wine", body, nn.Linear(32, 3), data.split("wine", seed), (3e-3, 0.05), 30, batch_size=16)


# --- held out ---


def gru(seed):
    body = _Last(nn.GRU(8, 48, batch_first=True))
    return _classes(seed, "gru", body, nn.Linear(48, 10), data.digits(seed, (8, 8)), (5e-3, 0.3), 10)


class _Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.silu(self.up(self.norm(x))))


def residual(seed):
    body = nn.Sequential(nn.Linear(64, 48), *(_Residual(48) for _ in range(4)), nn.LayerNorm(48))
    return _classes(seed, "residual", body, nn.Linear(48, 10), data.digits(seed), (2e-3, 0.05), 7)


class _Pixels(nn.Module):
    """An embedding per place and gray value, added up."""

    def __init__(self, width=48):
        super().__init__()
        self.embed, self.norm, self.mix = nn.Embedding(64 * 17, width), nn.LayerNorm(width), nn.Linear(width, width)
        self.register_buffer("place", torch.arange(64) * 17)

    def forward(self, x):
        return F.relu(self.mix(self.norm(self.embed(x + self.place).mean(1))))


def embedding(seed):
    x, y, x_val, y_val = data.split("digits", seed, standardize=False)
    return _classes(
        seed, "embedding", _Pixels(), nn.Linear(48, 10), (x.long(), y, x_val.long(), y_val), (3e-3, 0.2), 8
    )  # fmt: skip


def autoencoder(seed):
    x, _, x_val, _ = data.digits(seed)
    body = _layers([64, 48, 24], nn.ELU)
    head = nn.Sequential(nn.Linear(24, 48), nn.ELU(), nn.Linear(48, 64))
    return Setup("autoencoder", seed, body, head, (x, x, x_val, x_val), F.mse_loss, "regression", (3e-3, 0.3), 10)


def tabular(seed):
    body = nn.Sequential(nn.Linear(30, 48), nn.SiLU(), nn.Dropout(0.2), nn.Linear(48, 48), nn.SiLU(), nn.Dropout(0.2))
    return _classes(
        seed, "tabular", body, nn.Linear(48, 2), data.split("breast_cancer", seed), (2e-3, 0.05), 15, batch_size=32
    )  # fmt: skip


CALIBRATION = (mlp, tanh_mlp, deep_mlp, cnn, bn_cnn, lstm, transformer, regression, logistic, wine)
HELD_OUT = (gru, residual, embedding, autoencoder, tabular)
OPTIMIZERS = ("adamw", "sgd", "adam", "ok.adamw", "fuse", "sgd_plain")


def build(family, seed):
    """The healthy setup of a family: seed, optimizer and precision vary."""
    torch.manual_seed(seed)
    setup = family(seed)
    setup.optimizer = OPTIMIZERS[seed % len(OPTIMIZERS)]
    if seed % 4 == 3 and setup.family != "lstm":
        setup.trainer["precision"] = "bf16-mixed"
    return setup
