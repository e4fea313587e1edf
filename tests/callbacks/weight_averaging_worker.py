# SPDX-License-Identifier: Apache-2.0
"""Runs cases of test_weight_averaging_sharded.py in two processes and saves, per rank, what they found.

Usage: python weight_averaging_worker.py OUTPUT_FOLDER CASE [CASE ...]. Started in two processes.
"""

import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_optkit.averaging import EMA, LAWA, SWA
from lightning_optkit.callbacks import Fuse, SnapshotEnsemble, WeightAveraging


class ExportsWeights(pl.Callback):
    """Writes a file of weights only after step 4, before the validation of that step."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.path, weights_only=True)


class Regression(pl.LightningModule):
    """Global batches of 4, six steps in three epochs; records what validation sees."""

    def __init__(self, norm=False, shards=False, frozen=False):
        super().__init__()
        torch.manual_seed(0)
        norms = [nn.BatchNorm1d(8)] if norm else []
        self.net = nn.Sequential(nn.Linear(4, 8), *norms, nn.Tanh(), nn.Linear(8, 3))
        self.net[0].requires_grad_(not frozen)
        self.shards, self.seen = shards, {}

    def configure_model(self):
        if self.shards and not hasattr(self.net, "set_requires_gradient_sync"):
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def forward(self, x):
        return self.net(x)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.seen[self.global_step] = whole(self)

    def loader(self):
        """Lightning would shuffle: each rank takes every second sample, in order."""
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator))
        world = self.trainer.world_size
        sampler = DistributedSampler(data, world, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=4 // world, sampler=sampler)

    train_dataloader = val_dataloader = loader


def whole(module):
    """State dict of plain tensors."""
    tensors = module.state_dict().items()
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for name, t in tensors}


def strategy_of(name):
    if name == "one":
        return dict(devices=1)
    if name == "ddp":
        return dict(devices=2, strategy=DDPStrategy(process_group_backend="gloo", start_method="popen"))
    sharded = ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=name == "sharded files",
        process_group_backend="gloo",
    )
    return dict(devices=2, strategy=sharded)


def trainer_of(strategy, callbacks=(), keep=None, epochs=3):
    return pl.Trainer(
        callbacks=[*callbacks, *([keep] if keep else [])],
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=keep is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **strategy_of(strategy),
    )


def make(average, second=None, **kwargs):
    first = WeightAveraging(average, **kwargs)
    return [first, *([WeightAveraging(second, evaluate=False)] if second else [])]


CASES = {
    "ddp, SWA, BatchNorm": dict(strategy="ddp", average=SWA(0.5), norm=True, update_bn=True),
    "ddp, LAWA, folded EMA": dict(strategy="ddp", average=LAWA(3), second=EMA(0.5), fuse=True),
    "full files, EMA": dict(strategy="full files", average=EMA(0.5)),
    "sharded files, EMA": dict(strategy="sharded files", average=EMA(0.5, start=6)),
    "full files, folded EMA": dict(strategy="full files", average=EMA(0.5), fuse=True),
    "sharded files, folded EMA": dict(strategy="sharded files", average=EMA(0.5), fuse=True),
    "sharded files, SWA and LAWA": dict(strategy="sharded files", average=SWA(2), second=LAWA(2, every=2)),
    "sharded files, in another order": dict(
        strategy="sharded files", average=EMA(0.5), second=SWA(2), fuse=True, reverses=True
    ),
    "full files, in another order": dict(
        strategy="full files", average=EMA(0.5), second=EMA(0.9), fuse=True, reverses=True
    ),
}


def run(folder, strategy, average, second=None, fuse=False, norm=False, update_bn=False, reverses=False):
    """An uninterrupted run, and one resumed from the end of its second epoch."""
    shards = strategy.endswith("files")
    folder = Path(folder)
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    averages = make(average, second, update_bn=update_bn)
    module = Regression(norm, shards)
    fused = [Fuse(verbose=False)] if fuse else []
    snapshots = [SnapshotEnsemble(2, folder / "snapshots")] if strategy == "ddp" else []
    trainer = trainer_of(strategy, [*fused, *averages, *snapshots, ExportsWeights(folder / "weights.ckpt")], keep)
    trainer.fit(module)
    state = trainer.optimizers[0].state[next(module.parameters())]
    result = {
        "weights": whole(module),
        "seen": module.seen,
        "second": {n: full(a) for n, a in averages[-1].averaged_parameters(module).items()},
        "local shapes": {n: tuple(t.to_local().shape) for n, t in state.items() if hasattr(t, "to_local")},
        "explained": [a.explain() for a in averages],
        "snapshots": [str(path) for ensemble in snapshots for path in ensemble.paths],
    }
    if shards:
        again = make(average, second, update_bn=update_bn)
        resumed = Regression(norm, shards)
        trainer_of(strategy, [*fused, *again[:: -1 if reverses else 1]]).fit(resumed, ckpt_path=folder / "epoch=1.ckpt")
        result["resumed"] = {
            "weights": whole(resumed),
            "seen": resumed.seen,
            "second": {n: full(a) for n, a in again[-1].averaged_parameters(resumed).items()},
        }
        result["from the file"] = from_file(strategy, folder / "epoch=2.ckpt", norm)
    result["exported"] = from_file(strategy, folder / "weights.ckpt", norm)
    return trainer.global_rank, result


def from_file(strategy, path, norm):
    """What a module holds that is validated from a checkpoint."""
    module = Regression(norm, shards=strategy.endswith("files"))
    trainer_of(strategy).validate(module, ckpt_path=path, verbose=False)
    return whole(module)


FROZEN = "frozen.ckpt"  # of one process, after its second epoch


def resumed_with_frozen(strategy, file):
    """The weights of a run with a frozen layer that goes on from a file of one process, and what it began from."""
    module, begins = Regression(shards=strategy == "full files", frozen=True), Begins()
    trainer_of(strategy, [WeightAveraging(EMA(0.5)), begins]).fit(module, ckpt_path=file)
    return {"weights": whole(module), "began": begins.weights}


RINGS = [("full files", 2, 4), ("sharded files", 2, 4), ("full files", 4, 2), ("sharded files", 4, 2)]


def resumed_with_another_ring(strategy, before, now, folder):
    """The mean of the last snapshots after a run that goes on with another number of them, and what it must be."""
    kept, path = Steps(), Path(folder, "ring.ckpt")
    trainer = trainer_of(strategy, [WeightAveraging(LAWA(before)), kept], epochs=2)
    trainer.fit(Regression(shards=True))
    trainer.save_checkpoint(path)
    module, averaging = Regression(shards=True), WeightAveraging(LAWA(now))
    trainer_of(strategy, [averaging, kept]).fit(module, ckpt_path=path)
    mean = {name: torch.stack([each[name] for each in kept.weights[-now:]]).mean(0) for name in kept.weights[0]}
    return {n: full(a) for n, a in averaging.averaged_parameters(module).items()}, mean


class Steps(pl.Callback):
    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append(whole(pl_module))


class Begins(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        self.weights = whole(pl_module)


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def what_lightnings_own_says():
    """Its callback on a module that is sharded by FSDP2."""
    try:
        trainer_of("full files", [EMAWeightAveraging()]).fit(Regression(shards=True))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(folder, *cases):
    warnings.simplefilter("ignore")
    for case in cases:
        rank, result = run(os.path.join(folder, case), **CASES[case])
        torch.save(result, os.path.join(folder, f"{case} {rank}.pt"))
    torch.save(resumed_with_frozen("full files", Path(folder, FROZEN)), Path(folder, f"frozen {rank}.pt"))
    rings = [resumed_with_another_ring(*ring, Path(folder, f"ring {place}")) for place, ring in enumerate(RINGS)]
    torch.save(rings, Path(folder, f"rings {rank}.pt"))
    Path(folder, "Lightning's own.txt").write_text(what_lightnings_own_says())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
