# SPDX-License-Identifier: Apache-2.0
"""Training without a Trainer: a plain loop and Fabric, where the optimizer takes clip and average itself."""

from typing import Any

import torch
from _client import Run
from lightning.fabric import Fabric, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optkit as ok

DTYPES = {"plain64": torch.float64, "Fuse64": torch.float64}


def digits() -> DataLoader[Any]:
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    return DataLoader(TensorDataset(images.float() / 16, labels), batch_size=32, shuffle=True)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 10))


def optimizer_of(variant: str, net: nn.Module) -> torch.optim.Optimizer:
    """torch's, the same rule in one pass, or with everything the README's stack has."""
    if variant.startswith("plain"):
        return torch.optim.AdamW(net.parameters(), lr=1e-3)
    stages = {"clip": ok.AutoClip(percentile=10), "average": ok.EMA(0.999)} if variant in ("stack", "README") else {}
    return ok.AdamW(net.parameters(), lr=1e-3, **stages)


def schedule_(variant: str, optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    if variant in ("stack", "README"):
        factor = ok.schedules.warmup_cosine(warmup=0.05)(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * factor


def forever(loader: DataLoader[Any]) -> Any:
    while True:
        yield from loader


def plain_loop(variant: str, steps: int) -> Run:
    """No library but torch and this package; the README's precision is autocast."""
    seed_everything(0, verbose=False)
    run, net = Run(), network().to(DTYPES.get(variant, torch.float32))
    optimizer, batches = optimizer_of(variant, net), forever(digits())
    for step in range(steps):
        with run.step():
            images, labels = next(batches)
            schedule_(variant, optimizer, step, steps)
            with torch.autocast("cpu", torch.bfloat16, enabled=variant == "README"):
                loss: Tensor = nn.functional.cross_entropy(net(images.to(net[0].weight.dtype)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        run.losses.append(float(loss))
    return run


def fabric_loop(variant: str, steps: int) -> Run:
    """As the first page of Fabric's documentation."""
    precision = {"README": "bf16-mixed", "plain64": "64-true", "Fuse64": "64-true"}.get(variant, "32-true")
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric.seed_everything(0, verbose=False)
    run, net = Run(), network()
    net, optimizer = fabric.setup(net, optimizer_of(variant, net))
    batches = forever(fabric.setup_dataloaders(digits()))
    for step in range(steps):
        with run.step():
            images, labels = next(batches)
            schedule_(variant, optimizer, step, steps)
            loss = nn.functional.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
        run.losses.append(float(loss))
    return run


CLIENTS = {"a plain loop": plain_loop, "Fabric": fabric_loop}
