# SPDX-License-Identifier: Apache-2.0
"""Two processes train with dropout and shuffling, once whole and twice resumed, from the middle of a run and from a
checkpoint written after a shorter one; then so with loaders that are made again. Each saves its weights.

Usage: python exact_resume_worker.py FOLDER. Started in two processes.
"""

import os
import sys
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import ExactResume


class Noisy(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].sum().item())
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self):
        torch.manual_seed(7 + self.global_rank)  # each process draws numbers of its own
        data = TensorDataset(torch.arange(64.0).view(16, 4) / 64)
        return DataLoader(data, batch_size=2, shuffle=True)


class SaveAt(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            trainer.save_checkpoint(self.path)


def run(folder, ckpt_path=None, epochs=3, path=None, **kwargs):
    seed = 1 if ckpt_path is None else 2
    pl.seed_everything(seed, verbose=False)  # which Lightning gives to its sampler
    trainer = pl.Trainer(
        callbacks=[ExactResume(), *([] if ckpt_path else [SaveAt(f"{folder}/middle.ckpt")])],
        max_epochs=epochs,
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", start_method="popen"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    module = Noisy()
    trainer.fit(module, ckpt_path=ckpt_path)
    assert os.environ["PL_GLOBAL_SEED"] == str(seed)
    if path is not None:
        trainer.save_checkpoint(path)
    return trainer.global_rank, dict(weights=module.state_dict(), seen=module.seen)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = sys.argv[1]
    results = {"whole": run(folder)}
    results["resumed"] = run(folder, f"{folder}/middle.ckpt")
    run(folder, epochs=2, path=f"{folder}/after.ckpt")
    results["longer"] = run(folder, f"{folder}/after.ckpt")
    for every in (1, 2):
        reloads = dict(reload_dataloaders_every_n_epochs=every, epochs=4)
        results[f"whole {every}"] = run(folder, **reloads)
        results[f"resumed {every}"] = run(folder, f"{folder}/middle.ckpt", **reloads)
    for name, (rank, result) in results.items():
        torch.save(result, f"{folder}/{name} {rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
