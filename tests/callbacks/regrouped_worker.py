# SPDX-License-Identifier: Apache-2.0
"""Runs that are resumed with the groups of their optimizer in another order or division, by each kind of strategy.

Usage: python regrouped_worker.py FOLDER. It forks the processes of each run; `results.pt` has what became of them.
"""

import logging
import sys
import warnings
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from forked import KINDS, QUIET, finish, start, strategy_of

import lightning_optkit as ok

FAST, SLOW = dict(lr=0.04, weight_decay=0.3), dict(lr=0.01, weight_decay=0.0)
DIVISIONS = {  # settings and the places of parameters
    "saved": [(FAST, (0, 2, 1)), (SLOW, (3, 4, 5))],
    "reordered": [(SLOW, (5, 3, 4)), (FAST, (2, 1, 0))],
    "moved": [(SLOW, (5, 3)), (FAST, (2, 1, 0, 4))],
    "joined": [(FAST, range(6))],
    "halves": [(FAST, (0, 2, 1)), (FAST, (3, 4, 5))],
    "divided": [(SLOW, (4, 5)), (FAST, (0,)), (SLOW, (3,)), (FAST, (2, 1))],
    "fewer": [(FAST, (0, 2)), (SLOW, (3, 4, 5))],
}
CASES = {
    "Fuse": (torch.optim.AdamW, lambda: [ok.Fuse(verbose=False)]),
    "ExactResume": (torch.optim.AdamW, lambda: [ok.ExactResume()]),
    "ours": (ok.AdamW, lambda: [ok.ExactResume()]),
    "ours, a clip": (ok.AdamW, lambda: [ok.GradientClipping(ok.ClipNorm(0.1))]),
}
PAIRS = [("one", "ddp"), ("one", "fsdp full"), ("ddp", "one"), ("fsdp full", "one"), ("fsdp sharded", "fsdp sharded")]
PAIRS += [("ddp", "ddp"), ("fsdp full", "fsdp full"), ("fsdp sharded", "one"), ("fsdp sharded", "ddp")]
PAIRS += [("one", "fsdp sharded")]
AVERAGES = {
    "with": lambda: [ok.Fuse(verbose=False), ok.WeightAveraging(ok.EMA(0.9))],
    "without": lambda: [ok.Fuse(verbose=False)],
    "with ExactResume": lambda: [ok.Fuse(verbose=False), ok.WeightAveraging(ok.EMA(0.9)), ok.ExactResume()],
}
OTHERS = {  # resumed from a file of AdamW without an average
    "another class": (torch.optim.Adam, lambda: [ok.ExactResume()]),
    "an average added": (torch.optim.AdamW, lambda: [ok.ExactResume(), ok.WeightAveraging(ok.EMA(0.9))]),
    "an average and Fuse added": (torch.optim.AdamW, lambda: [ok.WeightAveraging(ok.EMA(0.9)), ok.Fuse(verbose=False)]),
}
CASES |= OTHERS
CASES |= {name: (torch.optim.AdamW, make) for name, make in AVERAGES.items()}


class Regression(pl.LightningModule):
    """Layers of equal shapes, so that a state of another layer is taken without a word."""

    def __init__(self, optimizer, division, schedule=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(6)])
        self.optimizer, self.division, self.schedule = optimizer, division, schedule

    def configure_model(self):
        if "ModelParallel" in type(self.trainer.strategy).__name__ and not hasattr(self.net, "reshard"):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[0].flip(1)).square().mean()

    def configure_optimizers(self):
        params = list(self.parameters())
        groups = [{"params": [params[p] for p in places], **s} for s, places in DIVISIONS[self.division]]
        optimizer = self.optimizer(groups, lr=0.02)
        if not self.schedule:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self):
        data = TensorDataset(torch.randn(32, 6, generator=torch.Generator().manual_seed(1)))
        world, rank = self.trainer.world_size, self.trainer.global_rank
        return DataLoader(data, 4 // world, sampler=DistributedSampler(data, world, rank, shuffle=False))


def run(case, division, kind, path=None, ckpt_path=None, schedule=False):
    """The weights after an epoch, or after two of a resumed run."""
    optimizer, callbacks = CASES[case]
    module = Regression(optimizer, division, schedule)
    trainer = pl.Trainer(
        **QUIET,
        **strategy_of(kind, KINDS[kind]),
        callbacks=callbacks(),
        max_epochs=1 if ckpt_path is None else 2,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    if path is not None:
        trainer.save_checkpoint(path)
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in module.parameters()]


def attempted(case, division, kind, **kwargs):
    """The weights of the first process, or what it said when it failed."""
    ended = finish(*start(partial(run, case, division, kind, **kwargs), KINDS[kind], waits=False), 60)
    errors = [each.error.splitlines()[-1] for each in ended if each.error]
    return errors[0] if errors else ended[0].value


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder, results = Path(sys.argv[1]), {}
    for saver in KINDS:
        attempted("ours", "saved", saver, path=folder / f"{saver}.ckpt", schedule=True)
    for saver, loader in PAIRS:
        for division in ("saved", "divided", "moved"):
            path = folder / f"{saver}.ckpt"
            results[saver, loader, division] = attempted("ours", division, loader, ckpt_path=path, schedule=True)
    path = folder / "never averaged.ckpt"
    attempted("without", "saved", "one", path=path)
    results["never averaged"] = attempted("without", "saved", "one", ckpt_path=path)
    for saver in KINDS:
        attempted("with", "saved", saver, path=folder / f"averaged {saver}.ckpt")
        for case in AVERAGES:
            for loader in {"one", saver}:
                path = folder / f"averaged {saver}.ckpt"
                results["averaged", saver, case, loader] = attempted(case, "saved", loader, ckpt_path=path)
    for saver, loader in [("fsdp full", "fsdp full"), ("fsdp sharded", "fsdp sharded"), ("fsdp sharded", "one")]:
        path = folder / f"halves {saver}.ckpt"
        if not path.exists():
            attempted("ExactResume", "halves", saver, path=path, schedule=True)
        for division in ("halves", "joined"):
            results["joined", saver, loader, division] = attempted(
                "ExactResume", division, loader, ckpt_path=path, schedule=True
            )
        for case in OTHERS:
            results[case, saver, loader] = attempted(case, "halves", loader, ckpt_path=path, schedule=True)
    torch.save(results, folder / "results.pt")
