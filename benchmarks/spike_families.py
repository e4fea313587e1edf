# SPDX-License-Identifier: Apache-2.0
"""Healthy runs of small networks, and bad batches that are tried and not stepped on; see spike_detection.py."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from precision_convergence import chars
from sklearn import datasets
from torch import Tensor, nn, optim
from torch.nn import functional as F

Data = tuple[Tensor, Tensor]
HURTS = 0.02  # of the progress so far
VOCABULARY, CONTEXT = 128, 64  # of `chars`


class Family(NamedTuple):
    """Data, network, loss, optimizer and batch size of a run."""

    data: Callable[[], Data]
    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Any], optim.Optimizer]
    batch_size: int


def standardized(values: Any) -> Tensor:
    x = torch.tensor(values, dtype=torch.float32)
    return (x - x.mean(0)) / (x.std(0) + 1e-6)


def classes(load: Callable[[], Any]) -> Callable[[], Data]:
    return lambda: (standardized(load().data), torch.tensor(load().target))


def targets(load: Callable[[], Any]) -> Callable[[], Data]:
    return lambda: (standardized(load().data), standardized(load().target).reshape(len(load().data), -1))


def images_twice() -> Data:
    x = standardized(datasets.load_digits().data)
    return x, x


def mlp(*sizes: int, act: type[nn.Module] = nn.ReLU, norm: bool = False, drop: float = 0.0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if norm else []), act(), nn.Dropout(drop)]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


def convolutional(norm: bool) -> nn.Sequential:
    def block(before: int, after: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, stride, 1), *([nn.BatchNorm2d(after)] if norm else []), nn.ReLU()]

    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), *block(1, 16, 1), *block(16, 32, 2), nn.Flatten(), nn.Linear(512, 10)
    )


class Residual(nn.Module):
    """Blocks of two layers that add to their input."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, width), nn.Linear(width, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Class logits."""
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.last(x)
        return out


class Recurrent(nn.Module):
    """Rows of an image, or characters if `vocabulary` is given."""

    def __init__(self, cell: type[nn.RNNBase], width: int, vocabulary: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width) if vocabulary else None
        self.cell = cell(width if vocabulary else 8, width, batch_first=True)  # type: ignore[call-arg]
        self.last = nn.Linear(width, vocabulary or 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits."""
        hidden, _ = self.cell(self.embedding(x) if self.embedding is not None else x.view(-1, 8, 8))
        out: Tensor = self.last(hidden if self.embedding is not None else hidden[:, -1])
        return out


class Transformer(nn.Module):
    """Over rows of an image, or over characters, each of which sees those before it."""

    def __init__(self, width: int, vocabulary: int = 0) -> None:
        super().__init__()
        self.first = nn.Embedding(vocabulary, width) if vocabulary else nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT if vocabulary else 8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.last = nn.Linear(width, vocabulary or 10)
        self.mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT) if vocabulary else None

    def forward(self, x: Tensor) -> Tensor:
        """Class logits."""
        x = self.first(x if self.mask is not None else x.view(-1, 8, 8)) + self.position
        x = self.layers(x, mask=self.mask, is_causal=self.mask is not None)
        out: Tensor = self.last(x if self.mask is not None else x.mean(1))
        return out


def of_characters(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


DIGITS, DIABETES = classes(datasets.load_digits), targets(datasets.load_diabetes)
CE = F.cross_entropy


def sgd(lr: float) -> Callable[[Any], optim.Optimizer]:
    return lambda params: optim.SGD(params, lr, momentum=0.9)


def by(kind: type[optim.Optimizer], lr: float) -> Callable[[Any], optim.Optimizer]:
    return lambda params: kind(params, lr=lr)  # type: ignore[call-arg]


FAMILIES = {
    "MLP, AdamW": Family(DIGITS, lambda: mlp(64, 64, 64, 10), CE, by(optim.AdamW, 3e-3), 32),
    "MLP, batches of 8": Family(DIGITS, lambda: mlp(64, 64, 64, 10), CE, sgd(0.015), 8),
    "MLP, batches of 2": Family(DIGITS, lambda: mlp(64, 64, 64, 10), CE, sgd(0.01), 2),
    "MLP, BatchNorm": Family(DIGITS, lambda: mlp(64, *[64] * 5, 10, norm=True), CE, sgd(0.1), 32),
    "MLP, dropout": Family(DIGITS, lambda: mlp(64, 64, 64, 10, drop=0.4), CE, by(optim.Adam, 2e-3), 16),
    "CNN": Family(DIGITS, lambda: convolutional(False), CE, by(optim.AdamW, 2e-3), 16),
    "CNN, BatchNorm": Family(DIGITS, lambda: convolutional(True), CE, sgd(0.05), 32),
    "LSTM": Family(DIGITS, lambda: Recurrent(nn.LSTM, 32), CE, by(optim.AdamW, 5e-3), 16),
    "transformer": Family(DIGITS, lambda: Transformer(32), CE, by(optim.AdamW, 2e-3), 32),
    "residual": Family(DIGITS, lambda: Residual(32, 6), CE, by(optim.AdamW, 1e-3), 16),
    "logistic": Family(DIGITS, lambda: mlp(64, 10), CE, by(optim.SGD, 0.1), 16),
    "regression": Family(DIABETES, lambda: mlp(10, 32, 32, 1), F.mse_loss, by(optim.AdamW, 3e-3), 16),
    "autoencoder": Family(
        images_twice, lambda: mlp(64, 32, 8, 32, 64, act=nn.GELU), F.mse_loss, by(optim.AdamW, 3e-3), 32
    ),
    "characters, GRU": Family(
        chars, lambda: Recurrent(nn.GRU, 64, VOCABULARY), of_characters, by(optim.AdamW, 3e-3), 8
    ),
    "wine": Family(classes(datasets.load_wine), lambda: mlp(13, 16, 16, 3), CE, by(optim.Adam, 3e-3), 8),
    "held out: characters, transformer": Family(
        chars, lambda: Transformer(48, VOCABULARY), of_characters, by(optim.AdamW, 2e-3), 8
    ),
    "held out: tumors, tanh": Family(
        classes(datasets.load_breast_cancer), lambda: mlp(30, 32, 32, 32, 2, act=nn.Tanh), CE, sgd(0.05), 16
    ),
    "held out: GRU": Family(DIGITS, lambda: Recurrent(nn.GRU, 32), CE, by(optim.RMSprop, 2e-3), 16),
    "held out: Huber loss": Family(DIABETES, lambda: mlp(10, 64, 64, 64, 1), F.smooth_l1_loss, sgd(0.02), 8),
    "held out: iris": Family(classes(datasets.load_iris), lambda: mlp(4, 16, 16, 3), CE, sgd(0.05), 4),
    "held out: deep residual": Family(DIGITS, lambda: Residual(24, 12), CE, by(optim.NAdam, 2e-3), 8),
    "held out: CNN, BatchNorm, Adam": Family(DIGITS, lambda: convolutional(True), CE, by(optim.Adam, 2e-3), 64),
    "held out: exercise, L1": Family(
        targets(datasets.load_linnerud), lambda: mlp(3, 16, 16, 3), F.l1_loss, by(optim.AdamW, 3e-3), 4
    ),
}


class Bad(NamedTuple):
    """A bad batch before a step, and the share of the progress so far that a step on it gives back."""

    kind: str
    loss: float
    norm: float
    lost: float
    drift: float  # what the same step gives back without gradients: momentum and decay go on by themselves

    @property
    def hurts(self) -> bool:
        """Whether the batch itself gives back more than HURTS."""
        return not self.lost - max(self.drift, 0.0) <= HURTS


class Step(NamedTuple):
    """A healthy step, and the bad batches tried before it."""

    loss: float
    norm: float
    bad: list[Bad]


def spoiled(kind: str, batch: Data, data: Data, generator: torch.Generator) -> Data | None:
    x, y = batch
    if kind == "inputs x 100":
        return (x * 100, y) if x.is_floating_point() else None
    if kind == "noise":
        if x.is_floating_point():
            return 3 * torch.randn(x.shape, generator=generator), y
        return torch.randint(int(data[0].max()) + 1, x.shape, generator=generator), y
    if y.is_floating_point():
        return x, y[torch.randperm(len(y), generator=generator)]
    return x, torch.randint(int(data[1].max()) + 1, y.shape, generator=generator)


def backward(network: nn.Module, loss: Tensor) -> float:
    network.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return float(torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm())


class Run:
    """One training of a family; the rate falls by a cosine with every third seed."""

    def __init__(self, family: Family, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.family, self.steps, self.data = family, steps, family.data()
        self.network = family.network()
        self.optimizer = family.optimizer(self.network.parameters())
        self.schedule = optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps) if seed % 3 == 1 else None
        self.generator = torch.Generator().manual_seed(seed)
        self.first: float | None = None

    def __iter__(self) -> Iterator[Step]:
        order: list[int] = []
        for step in range(self.steps):
            if len(order) < self.family.batch_size:
                order = torch.randperm(len(self.data[0]), generator=self.generator).tolist()
            places = [order.pop() for _ in range(self.family.batch_size)]
            batch = self.data[0][places], self.data[1][places]
            bad = self.tried(batch) if step >= 100 and step % 25 == 0 else []
            loss = self.family.loss(self.network(batch[0]), batch[1])
            norm = backward(self.network, loss)
            self.first = self.first or float(loss.detach())
            yield Step(float(loss.detach()), norm, bad)
            self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()

    def tried(self, batch: Data) -> list[Bad]:
        """Bad batches in place of `batch`; the run is as before."""
        buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        random, found = torch.get_rng_state(), []
        self.network.zero_grad()
        drift = self.lost()
        for kind in ("inputs x 100", "noise", "random labels"):
            changed = spoiled(kind, batch, self.data, self.generator)
            if changed is None:
                continue
            loss = self.family.loss(self.network(changed[0]), changed[1])
            norm = backward(self.network, loss)
            for buffer, before in buffers:
                buffer.copy_(before)
            found.append(Bad(kind, float(loss.detach()), norm, self.lost(), drift))
        torch.set_rng_state(random)
        return found

    def hurts(self) -> bool:
        """Whether the healthy step that is about to be taken hurts, by the measure of the bad ones."""
        lost, grads = self.lost(), [param.grad for param in self.network.parameters()]
        self.network.zero_grad()
        drift = self.lost()
        for param, grad in zip(self.network.parameters(), grads, strict=True):
            param.grad = grad
        return not lost - max(drift, 0.0) <= HURTS

    def lost(self) -> float:
        """The share of the progress so far that a step on the current gradients gives back; taken on a copy."""
        before = self.evaluated(self.network)
        network, optimizer = copy.deepcopy((self.network, self.optimizer))
        for param, other in zip(network.parameters(), self.network.parameters(), strict=True):
            param.grad = torch.zeros_like(param) if other.grad is None else other.grad
        optimizer.step()
        after = self.evaluated(network)
        return (after - before) / max((self.first or 0.0) - before, 1e-9) if math.isfinite(after) else math.inf

    @torch.no_grad()
    def evaluated(self, network: nn.Module) -> float:
        """The loss of a fixed batch."""
        network.eval()
        loss = float(self.family.loss(network(self.data[0][:256]), self.data[1][:256]))
        network.train()
        return loss
