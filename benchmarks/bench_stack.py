# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D101, D102  (Lightning documents its hooks)
"""Time of a whole training step of a tiny network: plain, with Fuse, with Lightning's own callbacks, with our stack.

The network is that of docs/getting_started.md, so small that Python takes most of a step. Variants run in turn, 400
steps each, on one thread; the medians of the runs but the first. One JSON line, then a table:
`python benchmarks/bench_stack.py [--runs 6]`.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import lightning_optkit as ok

STEPS = 400


class Tiny(pl.LightningModule):
    def __init__(self, has_scheduler: bool) -> None:
        super().__init__()
        self.has_scheduler = has_scheduler
        self.net = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        if not self.has_scheduler:
            return optimizer
        return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, STEPS), "interval": "step"}]


def stack() -> list[pl.Callback]:
    return [
        ok.Fuse(verbose=False),
        ok.GradientClipping(ok.ClipNorm(1.0)),
        ok.LRSchedule(ok.schedules.cosine(), verbose=False),
        ok.WeightAveraging(ok.EMA(0.97)),
    ]


# name -> callbacks, arguments of the Trainer
VARIANTS: dict[str, Any] = {
    "plain": lambda: ([], {}),
    "Fuse": lambda: ([ok.Fuse(verbose=False)], {}),
    "Lightning's clip, scheduler, EMA": lambda: ([EMAWeightAveraging(decay=0.97)], {"gradient_clip_val": 1.0}),
    "our clip, schedule, EMA, with Fuse": lambda: (stack(), {}),
}


def milliseconds(name: str, loader: DataLoader) -> float:
    callbacks, arguments = VARIANTS[name]()
    trainer = pl.Trainer(
        max_steps=STEPS, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **arguments,
    )  # fmt: skip
    module = Tiny(has_scheduler=name.startswith("Lightning"))
    started = time.perf_counter()
    trainer.fit(module, loader)
    return 1e3 * (time.perf_counter() - started) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=6, help="runs of each variant, the first of which does not count")
    runs = max(parser.parse_args().runs, 2)
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning_utilities.core.rank_zero"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(3200, 64), torch.randint(0, 10, (3200,))), batch_size=32)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(runs):
        for name in VARIANTS:
            times[name].append(milliseconds(name, loader))
    medians = {name: statistics.median(samples[1:]) for name, samples in times.items()}
    rounded = {name: round(value, 3) for name, value in medians.items()}
    print(json.dumps({"case": "stack", "ms": rounded, "torch": torch.__version__}))
    for name, value in medians.items():
        print(f"| {name} | {value:.2f} | {value / medians['plain']:.2f} |")


if __name__ == "__main__":
    main()
