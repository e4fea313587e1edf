# SPDX-License-Identifier: Apache-2.0
"""A small run that needs every part of its checkpoint, and all of its state at the end."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from forked import QUIET, strategy_of
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import ExactResume, Fuse, GradientClipping, WeightAveraging
from lightning_optkit.clipping import AutoClip

SAMPLES, BATCH, EPOCHS, WINDOW = 28, 2, 3, 3


class Augmented(Dataset):
    """Draws from torch, NumPy and Python for every sample."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        noise = 0.1 * np.random.rand() + 0.1 * random.random()
        return torch.full((4,), float(index)) / SAMPLES + 0.1 * torch.rand(4) + noise


class Net(pl.LightningModule):
    def __init__(self, seed=0):
        super().__init__()
        self.seed = seed
        torch.manual_seed(0)
        self.first, self.dropout, self.last = nn.Linear(4, 7), nn.Dropout(0.5), nn.Linear(7, 1)

    def configure_model(self):
        own = self.seed + 1000 * self.global_rank  # Lightning gives all processes the same seed
        random.seed(own), np.random.seed(own), torch.manual_seed(own)
        if "ModelParallel" in type(self.trainer.strategy).__name__ and not hasattr(self.first, "reshard"):
            for layer in (self.first, self.last):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        noise = random.random() + np.random.rand()
        return (self.last(self.dropout(self.first(batch))) - 1).square().mean() * (1 + noise)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.last(self.first(batch)).square().mean() + torch.rand(1), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Losses(pl.Callback):
    """The losses of the first process since the beginning of the run."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.is_global_zero:
            self.losses.append((trainer.current_epoch, batch_idx, outputs["loss"].item()))

    def state_dict(self):
        return {"losses": list(self.losses)}

    def load_state_dict(self, state_dict):
        self.losses = list(state_dict["losses"])


def loader(**kwargs: Any) -> DataLoader:
    return DataLoader(Augmented(), BATCH, **{"shuffle": True, **kwargs})


def state_of(trainer: pl.Trainer, module: pl.LightningModule, losses: Losses) -> dict[str, Any]:
    """Everything that a run has learned, counted or drawn; of shards those of this process."""
    averages = next(each for each in trainer.callbacks if isinstance(each, WeightAveraging))
    clipping = next(each for each in trainer.callbacks if isinstance(each, GradientClipping))
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return {
        "weights": dict(module.named_parameters()),
        "averages": averages.averaged_parameters(module),
        "optimizer": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "scheduler": [each.scheduler.state_dict() for each in trainer.lr_scheduler_configs],
        "clipping": clipping.state_dict(),
        "scaler": scaler.state_dict() if scaler else {},
        "losses": losses.losses if trainer.is_global_zero else [],
        "steps": (trainer.global_step, trainer.current_epoch),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }


def run(
    kind: str,
    world: int,
    seed: int,
    *callbacks: pl.Callback,
    ckpt_path: Any = None,
    scaled: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """The state after a run; `kwargs` are those of the loader, `window` the batches of a step, `epochs` its length."""
    window, epochs = kwargs.pop("window", 1), kwargs.pop("epochs", EPOCHS)
    make_loader = kwargs.pop("make_loader", loader)
    pl.seed_everything(seed, verbose=False)
    module, losses = Net(seed), Losses()
    torch.manual_seed(seed)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
    trainer = pl.Trainer(
        **QUIET,
        **strategy_of(kind, world),
        callbacks=[
            ExactResume(),
            *([] if scaled else [Fuse(verbose=False)]),
            GradientClipping(AutoClip()),
            WeightAveraging(EMA(decay=0.9, every=2)),
            losses,
            *callbacks,
        ],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)] if scaled else [],
        accumulate_grad_batches=window,
        max_epochs=epochs,
        val_check_interval=3,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
    )
    trainer.fit(module, make_loader(**kwargs), DataLoader(Augmented(), 7), ckpt_path=ckpt_path)
    return in_bytes(state_of(trainer, module, losses))


def in_bytes(state: Any) -> Any:
    """The same with the bytes of tensors, which are equal only if every bit is (a NaN too)."""
    if isinstance(state, torch.Tensor):
        local = state.to_local() if hasattr(state, "to_local") else state
        return (str(local.dtype), tuple(local.shape), local.detach().contiguous().flatten().view(torch.uint8).tolist())
    if isinstance(state, dict):
        return {name: in_bytes(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return tuple(in_bytes(value) for value in state)
    if isinstance(state, np.ndarray):
        return state.tobytes()
    return state.hex() if isinstance(state, float) else state


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The parts of the state that are not the same."""
    return [name for name in one if one[name] != other[name]]
