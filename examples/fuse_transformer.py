# SPDX-License-Identifier: Apache-2.0
"""A GPT-2-shaped model and the demo Transformer of Lightning, with and without Fuse: time per step and losses.

Run: python examples/fuse_transformer.py [--steps 50] [--rounds 4] [--threads 1] [--lr 1e-3]. About a minute. Needs
transformers for the first model, and leaves it out where that is not installed. The row of torch's own fused AdamW is
the yardstick of the losses: it shows how far rounding alone drives two runs apart. The demo, with its norms behind the
sums and ReLU between, doubles a difference with every step at a rate that is large for it; `--lr 1e-3` shows that.
"""

import argparse
import importlib.util
import logging
import platform
import statistics
import time
import warnings
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.demos import Transformer
from torch import nn
from torch.utils.data import DataLoader

from lightning_optkit.callbacks import Fuse

TOKENS, LENGTH, BATCH, WIDTH, HEADS = 500, 32, 4, 64, 4
LR = {"GPT-2 shape": 1e-3, "Lightning demo": 1e-4}
WARMUP = 5  # steps at the start of a run that do not count
VARIANTS = {  # what AdamW is given, and the callbacks
    "AdamW()": ({}, lambda: []),
    "AdamW(fused=True)": ({"fused": True}, lambda: []),
    "AdamW(), Fuse(norms=False)": ({}, lambda: [Fuse(norms=False, verbose=False)]),
    "AdamW(), Fuse()": ({}, lambda: [Fuse(verbose=False)]),
}
PLAIN = next(iter(VARIANTS))


class Language(pl.LightningModule):
    """Either model; remembers its losses and when each step began."""

    def __init__(self, kind: str, arguments: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.arguments, self.losses, self.times = kind, arguments, [], []
        if kind == "GPT-2 shape":
            from transformers import GPT2Config, GPT2LMHeadModel

            rates = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
            shape = dict(vocab_size=TOKENS, n_positions=LENGTH, n_embd=WIDTH, n_layer=4, n_head=HEADS)
            self.model = GPT2LMHeadModel(GPT2Config(**shape, **rates, bos_token_id=0, eos_token_id=0))
        else:
            shape = dict(vocab_size=TOKENS, ninp=WIDTH, nhead=HEADS, nhid=4 * WIDTH, nlayers=2)
            self.model = Transformer(**shape, dropout=0.0)

    def training_step(self, batch, batch_idx):
        """One batch of tokens."""
        self.times.append(time.perf_counter())
        if self.kind == "GPT-2 shape":
            loss = self.model(input_ids=batch, labels=batch).loss
        else:
            loss = nn.functional.nll_loss(self.model(batch, batch).flatten(0, -2), batch.flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), **self.arguments)


def train(kind: str, variant: str, steps: int, lr: float) -> tuple[list[float], list[float]]:
    """Losses, and the times from step to step in milliseconds, those of the first steps left out."""
    data = torch.randint(0, TOKENS, (BATCH * steps, LENGTH), generator=torch.Generator().manual_seed(1))
    arguments, make_callbacks = VARIANTS[variant]
    module = Language(kind, {"lr": lr, **arguments})
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=make_callbacks(), **quiet)
    trainer.fit(module, DataLoader(data, batch_size=BATCH))
    times = module.times[WARMUP:]
    return module.losses, [1000 * (after - before) for before, after in pairwise(times)]


def compare(kind: str, steps: int, rounds: int, lr: float) -> list[str]:
    """Rows of the table: the variants take turns, so that a busy minute of the machine falls on all of them."""
    losses: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for round in range(rounds):
        for variant in VARIANTS:
            losses[variant], new = train(kind, variant, steps, lr)
            times[variant] += new
            print(f"  {kind}, round {round + 1} of {rounds}, {variant}: {statistics.median(new):.1f} ms", flush=True)
    rows = []
    for variant in VARIANTS:
        gap = max(abs(a - b) for a, b in zip(losses[PLAIN], losses[variant], strict=True))
        plain_ms, ms = statistics.median(times[PLAIN]), statistics.median(times[variant])
        rows.append(f"| {kind}, lr {lr:g} | {variant} | {ms:.1f} | {plain_ms / ms:.2f} | {gap:.1e} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lr", type=float, help="of both models, instead of each one's own")
    arguments = parser.parse_args()
    if arguments.steps < WARMUP + 2 or min(arguments.rounds, arguments.threads) < 1:
        parser.error(f"--steps must be at least {WARMUP + 2}, --rounds and --threads at least 1")
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    kinds = ["GPT-2 shape", "Lightning demo"]
    if importlib.util.find_spec("transformers") is None:
        kinds.remove("GPT-2 shape")
        print("transformers is not installed: the GPT-2 shape is left out")
    began = time.perf_counter()
    rows = [row for kind in kinds for row in compare(kind, arguments.steps, arguments.rounds, arguments.lr or LR[kind])]
    print(f"\n{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    print(
        f"| model | trained with | ms per step | times faster | losses of {arguments.steps} steps differ by at most |"
    )
    print("|---|---|---|---|---|", *rows, sep="\n")
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
