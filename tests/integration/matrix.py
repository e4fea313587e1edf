# SPDX-License-Identifier: Apache-2.0
"""Every rule and callback in one process, under DDP and under FSDP2, resumed by itself and by the others, as a table.

Usage: python matrix.py FOLDER [ROW ...]. Prints a table in Markdown. The exit status is 1 if a cell is wrong: a
resumed run that is not byte-equal, or a run that differs from that of one process by more than its row allows.
"""

import logging
import re
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from forked import KINDS, QUIET, finish, start, strategy_of

from lightning_optkit import averaging, callbacks, clipping, optimizers, schedules

WIDTH, GLOBAL_BATCH, BATCHES, EPOCHS = 7, 32, 4, 2
MIDDLE = (0, 1)
CHANGES = [  # who saves at the end of the first epoch, and who goes on
    ("one", "ddp"),
    ("one", "fsdp full"),
    ("ddp", "one"),
    ("ddp", "fsdp full"),
    ("fsdp full", "one"),
    ("fsdp full", "ddp"),
    ("fsdp sharded", "fsdp full"),
]


class Row(NamedTuple):
    optimizer: Callable[[pl.LightningModule], Any]
    callbacks: Callable[[], list[pl.Callback]] = list
    tolerance: float = 1e-6  # of the weights, relative to the largest
    saved_to: float = 0.0  # the same of a resumed run, where a checkpoint is rounded
    precision: Any = None  # of the Trainer


class Product(nn.Module):
    """Square weights, since the basis in which SOAP begins is arbitrary for others; shards of 7 rows are uneven."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        return self.out(torch.tanh(self.one(x)) * torch.tanh(self.other(x)))


class Net(pl.LightningModule):
    def __init__(self, row):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.make_optimizer = Product(), row.optimizer

    def configure_model(self):
        if "ModelParallel" in type(self.trainer.strategy).__name__ and not hasattr(self.net, "reshard"):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return self.make_optimizer(self)

    def train_dataloader(self):
        """In order, so that the batches of all processes together are those of one."""
        draw, world = torch.Generator().manual_seed(1), self.trainer.world_size
        x = torch.randn(GLOBAL_BATCH * BATCHES, WIDTH, generator=draw)
        dataset = TensorDataset(x, x.flip(1))
        sampler = DistributedSampler(dataset, world, self.global_rank, shuffle=False)
        return DataLoader(dataset, GLOBAL_BATCH // world, sampler=sampler)


class Saves(pl.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == MIDDLE:
            trainer.save_checkpoint(self.folder / "middle.ckpt")

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.folder / "end.ckpt")


def run(row, kind, folder=None, ckpt_path=None):
    """The weights, and averages, after a run."""
    pl.seed_everything(1 if ckpt_path is None else 2, verbose=False)
    module, own = Net(row), row.callbacks()
    trainer = pl.Trainer(
        **QUIET,
        **strategy_of(kind, KINDS[kind]),
        callbacks=[callbacks.ExactResume(), *own, *([Saves(folder)] if folder else [])],
        max_epochs=EPOCHS,
        precision=row.precision,
        use_distributed_sampler=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    tensors = {name: whole(param) for name, param in module.named_parameters()}
    for each in own:
        if isinstance(each, callbacks.WeightAveraging):
            tensors |= {f"average of {name}": whole(t) for name, t in each.averaged_parameters(module).items()}
    return tensors


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def attempted(row, kind, **kwargs):
    """The weights of the first process, or what a process said when it failed."""
    ended = finish(*start(partial(run, row, kind, **kwargs), KINDS[kind], waits=False), 60)
    errors = [each.error.splitlines()[-1] for each in ended if each.error]
    if errors or ended[0].value is None:
        return errors[0] if errors else "no answer within 60 s"
    return ended[0].value


def distance(one, other):
    """The largest difference of a tensor, relative to its largest element."""
    return max((one[name] - other[name]).abs().max().item() / one[name].abs().max().item() for name in one)


def said(text):
    is_refusal = re.match(r"ValueError: \w+\(.*\): ", text)  # a sentence with an owner
    return ("refused: " if is_refusal else "**fails**: ") + text.split(": ", 1)[1].split(";")[0]


def compared(one, other, tolerance):
    """The cell of two runs, and whether it is right."""
    if isinstance(other, str):
        return said(other), said(other).startswith("refused")
    far = distance(one, other)
    return ("equal" if far == 0 else f"{far:.0e}"), far <= tolerance


def cells(name, row, folder):
    """The cells of a row, and whether all are right."""
    folders = {kind: folder / f"{name} {kind}" for kind in KINDS}
    wholes = {kind: attempted(row, kind, folder=folders[kind]) for kind in KINDS}
    if isinstance(wholes["one"], str):
        return [said(wholes["one"])], said(wholes["one"]).startswith("refused")
    found = [compared(wholes["one"], wholes[kind], row.tolerance) for kind in ("ddp", "fsdp full", "fsdp sharded")]
    shown = [found[0], max(found[1:], key=lambda cell: (not cell[1], cell[0]))]
    works = [kind for kind in KINDS if not isinstance(wholes[kind], str)]
    resumed = {
        kind: compared(wholes[kind], attempted(row, kind, ckpt_path=folders[kind] / "middle.ckpt"), row.saved_to)
        for kind in works
    }
    wrong = [f"{kind}: {cell}" for kind, (cell, is_right) in resumed.items() if not is_right]
    equal = "byte-equal" if all(cell == "equal" for cell, _ in resumed.values()) else f"to {row.saved_to:.0e}"
    shown.append(("; ".join(wrong) or f"{equal}, {len(resumed)} of {len(resumed)}", not wrong))
    allowed = max(row.tolerance, row.saved_to)
    changed = {
        f"{a} to {b}": compared(wholes["one"], attempted(row, b, ckpt_path=folders[a] / "end.ckpt"), allowed)
        for a, b in CHANGES
        if a in works and b in works
    }
    wrong = [f"{change}: {cell}" for change, (cell, is_right) in changed.items() if not is_right]
    largest = max((float(cell.replace("equal", "0")) for cell, is_right in changed.values() if is_right), default=0)
    shown.append(("; ".join(wrong) or f"{largest:.0e}, {len(changed)} of {len(changed)}", not wrong))
    return [cell for cell, _ in shown], all(is_right for _, is_right in shown)


# --- rows ---


def rule(name, tolerance=1e-6, **kwargs):
    return Row(lambda module: getattr(optimizers, name)(module.parameters(), **kwargs), tolerance=tolerance)


def schedule_free(name):
    return rule(name, lr=0.01)._replace(callbacks=lambda: [callbacks.ScheduleFree()])


def beside_adamw(*make, **kwargs):
    return Row(
        lambda module: torch.optim.AdamW(module.parameters(), lr=0.01), lambda: [each() for each in make], **kwargs
    )


def clip(make):
    return beside_adamw(lambda: callbacks.Fuse(verbose=False), lambda: callbacks.GradientClipping(make()))


def average(make):
    return beside_adamw(lambda: callbacks.Fuse(verbose=False), lambda: callbacks.WeightAveraging(make()))


def split32(row):
    return row._replace(precision="bf16-true", tolerance=BFLOAT16)


BFLOAT16 = 0.02  # gradients are of bf16, and so is their mean over processes
ROUNDED = 5e-6  # for what magnifies rounding, eigenvectors and quotients of gradients; in fp64 they differ by 1e-15

RULES = {  # but for the learning rate, their defaults
    "ADOPT": {}, "AdEMAMix": {}, "AdaBelief": {"eps": 1e-8}, "Adadelta": {}, "Adafactor": {}, "Adagrad": {}, "Adam": {},
    "AdamW": {}, "Adamax": {}, "Adan": {}, "CAME": {}, "LAMB": {}, "LARS": {}, "Lion": {}, "MARS": {}, "Muon": {},
    "NAdam": {}, "RAdam": {}, "RMSprop": {}, "SGD": {"momentum": 0.9}, "SOAP": {"tolerance": ROUNDED}, "Signum": {},
    "SophiaG": {}, "StableAdamW": {},
}  # fmt: skip
ROWS = {
    **{name: rule(name, lr=0.01, **kwargs) for name, kwargs in RULES.items()},
    "Prodigy": rule("Prodigy", d0=1e-3),
    "DAdaptAdam": rule("DAdaptAdam", d0=1e-3),
    "ScheduleFreeAdamW": schedule_free("ScheduleFreeAdamW"),
    "ScheduleFreeSGD": schedule_free("ScheduleFreeSGD")._replace(
        saved_to=1e-7
    ),  # sharded: trained from averaged weights
    'AdamW, state_dtype="int8"': rule("AdamW", lr=0.01, state_dtype="int8"),
    "AdamW, caution=True": rule("AdamW", lr=0.01, caution=True),
    "AdamW, centralize=True": rule("AdamW", lr=0.01, centralize=True),
    "Fuse": beside_adamw(lambda: callbacks.Fuse(verbose=False)),
    'Fuse(state_dtype="int8")': beside_adamw(lambda: callbacks.Fuse(state_dtype="int8", verbose=False)),
    'Fuse(rounding="split32")': split32(beside_adamw(lambda: callbacks.Fuse(rounding="split32", verbose=False))),
    'AdamW, rounding="split32"': split32(rule("AdamW", lr=0.01, rounding="split32")),
    "ClipNorm": clip(lambda: clipping.ClipNorm(0.1)),
    "ClipValue": clip(lambda: clipping.ClipValue(0.01)),
    "ClipPerTensor": clip(lambda: clipping.ClipPerTensor(0.05)),
    "ClipUnitwise": clip(lambda: clipping.ClipUnitwise(0.01)),
    "AutoClip": clip(clipping.AutoClip),
    "ZClip": clip(clipping.ZClip),
    "AutoClip without Fuse": beside_adamw(lambda: callbacks.GradientClipping(clipping.AutoClip())),
    "EMA": average(lambda: averaging.EMA(decay=0.9)),
    "PowerEMA": average(averaging.PowerEMA),
    "SWA": average(averaging.SWA),
    "LAWA": average(lambda: averaging.LAWA(2, 2)),
    "EMA without Fuse": beside_adamw(lambda: callbacks.WeightAveraging(averaging.EMA(decay=0.9))),
    "SAM": beside_adamw(lambda: callbacks.SAM(sync=True)),
    "GSAM": beside_adamw(lambda: callbacks.GSAM(sync=True)),
    "LookSAM": beside_adamw(lambda: callbacks.LookSAM(sync=True), tolerance=ROUNDED),
    "WSAM": beside_adamw(lambda: callbacks.WSAM(sync=True)),
    "MaxNorm": beside_adamw(lambda: callbacks.MaxNorm(0.3)),
    "GradientNoise": beside_adamw(callbacks.GradientNoise),
    "Lookahead": beside_adamw(callbacks.Lookahead),
    "Grokfast": beside_adamw(callbacks.Grokfast),
    "ElasticNet": beside_adamw(lambda: callbacks.ElasticNet(0.01)),
    "LRSchedule": beside_adamw(lambda: callbacks.LRSchedule(schedules.cosine())),
    "ParameterGroups": beside_adamw(callbacks.ParameterGroups),
    "ReleaseGradients": beside_adamw(lambda: callbacks.Fuse(verbose=False), callbacks.ReleaseGradients),
    "CompressCheckpoint": beside_adamw(callbacks.CompressCheckpoint, saved_to=0.01),
    "ScheduleFreeWrapper": beside_adamw(callbacks.ScheduleFreeWrapper),
}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder, names, wrong = Path(sys.argv[1]), sys.argv[2:] or [*ROWS], []
    begun = time.monotonic()
    print("| rule or callback | DDP 2 | FSDP2 2 | resumed within an epoch | resumed by others |\n|---|---|---|---|---|")
    for name in names:
        row, is_right = cells(name, ROWS[name], folder)
        wrong += [] if is_right else [name]
        print("| " + " | ".join([name, *row]) + " |", flush=True)
    print(f"\n{len(names)} rows in {time.monotonic() - begun:.0f} s; wrong: {wrong or 'none'}")
    sys.exit(bool(wrong))
