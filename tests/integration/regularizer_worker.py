# SPDX-License-Identifier: Apache-2.0
"""Runs the cases of test_regularizers.py in two processes and saves, per rank, what is left after each.

Usage: python regularizer_worker.py OUTPUT_FOLDER CASE [CASE ...]. Started in two processes.
"""

import os
import sys
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_optkit.averaging import EMA, LAWA, SWA
from lightning_optkit.callbacks import (
    GSAM,
    SAM,
    ActivationRegularization,
    DropoutSchedule,
    EarlyStoppingCriterion,
    ElasticNet,
    Fuse,
    GradientNoise,
    Grokfast,
    LabelSmoothing,
    Lookahead,
    LookSAM,
    MaxNorm,
    RDrop,
    StochasticDepth,
    WeightAveraging,
)
from lightning_optkit.schedules import linear

GLOBAL_BATCH = 4


def adamw(params):
    return torch.optim.AdamW(params, lr=0.02, weight_decay=0.0)


class Alternating(nn.Module):
    """Dropout whose mask depends on nothing but how often it ran: the same in any number of processes."""

    def __init__(self):
        super().__init__()
        self.runs = 0

    def forward(self, x):
        self.runs += self.training
        mask = torch.arange(x.shape[-1]) % 2 == self.runs % 2
        return torch.where(mask, 2 * x, 0.0) if self.training else x


class Classifier(pl.LightningModule):
    """A residual net. Random numbers start anew with each batch.

    Args:
        dropout: Its dropout module.
        configure: Makes its optimizer of parameters.
        fail_at: Batch of epoch 1 in which it raises.
    """

    def __init__(self, dropout=None, configure=adamw, fail_at=None):
        super().__init__()
        self.configure, self.fail_at = configure, fail_at
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 8)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.dropout, self.head = dropout or nn.Identity(), nn.Linear(8, 3)

    def forward(self, x):
        h = self.stem(x)
        for branch in self.branches:
            h = h + branch(h)
        return self.head(self.dropout(h))

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            from torch.distributed.fsdp import fully_shard

            for layer in (self.stem, *self.branches, self.head):
                if not hasattr(layer, "set_requires_gradient_sync"):
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return self.configure(self.parameters())

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(100 * self.current_epoch + batch_idx)

    def training_step(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (1, self.fail_at):
            raise KeyError("stop")
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        """An error that rises, and that each process knows only of its own samples."""
        self.log("val_wrong", nn.functional.cross_entropy(self(batch[0]), (batch[1] + 1) % 3))

    def loader(self):
        """Lightning would shuffle under DDP: each rank takes every second sample, in order."""
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.randn(16, 4, generator=generator), torch.randint(0, 3, (16,), generator=generator))
        sampler = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=GLOBAL_BATCH // self.trainer.world_size, sampler=sampler)

    train_dataloader = val_dataloader = loader


# name -> callbacks, dropout. Those of RANDOM draw anew in each process, and cannot equal a single one.
CASES = {
    "label smoothing": lambda: ([LabelSmoothing(0.2)], None),
    "elastic net": lambda: ([ElasticNet(l1=0.05, l2=0.1, verbose=False)], None),
    "elastic net, Fuse": lambda: (
        [Fuse(verbose=False), ElasticNet(l1=0.05, l2=0.1, exclude_bias_and_norm=False, verbose=False)],
        None,
    ),
    "sam, ascent in common": lambda: ([SAM(rho=0.2, sync=True)], None),
    "asam, ascent in common": lambda: ([SAM(adaptive=True, sync=True), LabelSmoothing(0.1)], None),
    "early stopping": lambda: ([EarlyStoppingCriterion("GL", alpha=10.0, monitor="val_wrong", verbose=False)], None),
    "gradient noise": lambda: ([GradientNoise(eta=0.1)], None),
    "r-drop": lambda: ([RDrop(2.0)], Alternating()),
    "max norm": lambda: ([MaxNorm(0.3)], None),
    "activations": lambda: ([ActivationRegularization("branches.*", alpha=2.0, beta=1.0)], None),
    "averages": lambda: (
        [
            WeightAveraging(EMA(0.5)),
            WeightAveraging(SWA(0.5), evaluate=False),
            WeightAveraging(LAWA(2), evaluate=False),
        ],
        None,
    ),
    "gsam": lambda: ([GSAM(rho=0.2, sync=True)], None),
    "look-sam": lambda: ([LookSAM(rho=0.2, k=2, sync=True)], None),
    "lookahead": lambda: ([Lookahead(k=3)], None),
    "grokfast": lambda: ([Grokfast(0.9, lamb=1.0)], None),
    "sam": lambda: ([SAM(rho=0.2)], nn.Dropout(0.3)),
    "dropout": lambda: ([DropoutSchedule(linear(0.0, 1.0), verbose=False)], nn.Dropout(0.5)),
    "depth": lambda: ([StochasticDepth("branches.*", verbose=False), RDrop(1.0)], nn.Dropout(0.5)),
}
RANDOM = ("sam", "dropout", "depth")
# Those that take parameters sharded by FSDP2, and do not draw.
SHARDED = (
    "label smoothing",
    "elastic net",
    "elastic net, Fuse",
    "sam, ascent in common",
    "asam, ascent in common",
    "early stopping",
    "gradient noise",
    "r-drop",
    "max norm",
    "activations",
    "averages",
    "gsam",
    "look-sam",
    "lookahead",
    "grokfast",
)


def strategy_of(world_size, sharded):
    if world_size == 1:
        return "auto"
    if not sharded:
        return DDPStrategy(process_group_backend="gloo", start_method="popen")
    return ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
        process_group_backend="gloo",
    )


def make_trainer(callbacks, epochs, world_size=1, sharded=False, **arguments):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return pl.Trainer(
        callbacks=callbacks,
        max_epochs=epochs,
        accumulate_grad_batches=2,
        accelerator="cpu",
        devices=world_size,
        strategy=strategy_of(world_size, sharded),
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **{**quiet, **arguments},
    )


def whole(tensors):
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for name, t in tensors.items()}


def run(case, epochs=4, world_size=1, ckpt_path=None, more=(), configure=adamw, fail_at=None, **arguments):
    """Epochs of two steps of two batches."""
    callbacks, dropout = CASES[case]()
    module = Classifier(dropout, configure, fail_at)
    trainer = make_trainer([*callbacks, *more], epochs, world_size, **arguments)
    trainer.fit(module, ckpt_path=ckpt_path)
    state = trainer.optimizers[0].state_dict()["state"]
    return trainer.global_rank, dict(
        weights=whole(dict(module.named_parameters())),
        state={place: whole(values) for place, values in state.items()},
        steps=trainer.global_step,
        sparsity=[callback.sparsity() for callback in callbacks if isinstance(callback, ElasticNet)],
    )


def run_sharded(case, folder):
    """A whole run, and one that goes on from its second epoch."""
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    arguments = dict(world_size=2, sharded=True)
    rank, result = run(case, more=[keep], enable_checkpointing=True, **arguments)
    _, result["resumed"] = run(case, ckpt_path=os.path.join(folder, "epoch=1.ckpt"), **arguments)
    return rank, result


def main(folder, *cases):
    warnings.simplefilter("ignore")
    for case in cases:
        rank, result = run(case, world_size=2)
        torch.save(result, os.path.join(folder, f"{case} {rank}.pt"))
    for case in SHARDED:
        rank, result = run_sharded(case, os.path.join(folder, case))
        torch.save(result, os.path.join(folder, f"{case}, sharded {rank}.pt"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
