# SPDX-License-Identifier: Apache-2.0
"""A GPT-2-shaped model and the demo Transformer of Lightning, with and without Fuse: time per step and losses.

Run: python examples/fuse_transformer.py [--steps 50] [--rounds 3]. About a minute on two cores. Needs transformers for
the first model, and leaves it out where that is not installed.
"""

import argparse
import importlib.util
import logging
import platform
import statistics
import time
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.demos import Transformer
from torch import nn
from torch.utils.data import DataLoader

from lightning_optkit.callbacks import Fuse

TOKENS, LENGTH, BATCH, WIDTH, HEADS, LAYERS = 500, 32, 4, 64, 4, 4
WARMUP = 5  # steps at the start of a run that do not count
VARIANTS = {"plain": None, "Fuse(norms=False)": False, "Fuse()": True}


class Language(pl.LightningModule):
    """Either model; remembers its losses and when each step began."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.losses, self.times = kind, [], []
        if kind == "GPT-2 shape":
            from transformers import GPT2Config, GPT2LMHeadModel

            rates = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
            shape = dict(vocab_size=TOKENS, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS)
            self.model = GPT2LMHeadModel(GPT2Config(**shape, **rates, bos_token_id=0, eos_token_id=0))
        else:
            shape = dict(vocab_size=TOKENS, ninp=WIDTH, nhead=HEADS, nhid=4 * WIDTH, nlayers=LAYERS)
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
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(kind: str, norms: bool | None, steps: int) -> tuple[list[float], list[float]]:
    """Losses, and the times from step to step in milliseconds, those of the first steps left out."""
    data = torch.randint(0, TOKENS, (BATCH * steps, LENGTH), generator=torch.Generator().manual_seed(1))
    module = Language(kind)
    callbacks = [] if norms is None else [Fuse(norms=norms, verbose=False)]
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(module, DataLoader(data, batch_size=BATCH))
    return module.losses, [1000 * (b - a) for a, b in zip(module.times[WARMUP:], module.times[WARMUP + 1 :])]


def compare(kind: str, steps: int, rounds: int) -> list[str]:
    """Rows of the table: the variants take turns, so that a busy minute of the machine falls on all of them."""
    losses: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for round in range(rounds):
        for variant, norms in VARIANTS.items():
            losses[variant], new = train(kind, norms, steps)
            times[variant] += new
            print(f"  {kind}, round {round + 1} of {rounds}, {variant}: {statistics.median(new):.1f} ms", flush=True)
    rows = []
    for variant in VARIANTS:
        gap = max(abs(a - b) for a, b in zip(losses["plain"], losses[variant], strict=True))
        median = {name: statistics.median(times[name]) for name in ("plain", variant)}
        ratio = median["plain"] / median[variant]
        rows.append(f"| {kind} | {variant} | {median[variant]:.1f} | {ratio:.2f} | {gap:.1e} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.steps < WARMUP + 2 or arguments.rounds < 1:
        parser.error(f"--steps must be at least {WARMUP + 2} and --rounds at least 1")
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    kinds = ["GPT-2 shape", "Lightning demo"]
    if importlib.util.find_spec("transformers") is None:
        kinds.remove("GPT-2 shape")
        print("transformers is not installed: the GPT-2 shape is left out")
    began = time.perf_counter()
    rows = [row for kind in kinds for row in compare(kind, arguments.steps, arguments.rounds)]
    print(f"\n{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"| model | variant | ms per step | times faster | losses of {arguments.steps} steps differ by at most |")
    print("|---|---|---|---|---|", *rows, sep="\n")
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
