# SPDX-License-Identifier: Apache-2.0
"""A GPT-2-shaped model and the demo Transformer of Lightning, with and without Fuse: losses and time per step.

Run: python examples/fuse_transformer.py [--steps 50]. Needs transformers for the first of the two.
"""

import argparse
import statistics
import time
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.demos import Transformer
from torch import nn
from torch.utils.data import DataLoader

from lightning_optkit.callbacks import Fuse


class Language(pl.LightningModule):
    """Either model; remembers its losses and when each step began."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.losses, self.times = kind, [], []
        if kind == "GPT-2 shape":
            from transformers import GPT2Config, GPT2LMHeadModel

            rates = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
            self.model = GPT2LMHeadModel(
                GPT2Config(vocab_size=1000, n_positions=64, n_embd=128, n_layer=4, n_head=4, **rates)
            )
        else:
            self.model = Transformer(vocab_size=1000, ninp=128, nhead=4, nhid=512, nlayers=4, dropout=0.0)

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


def train(kind: str, callbacks: list[pl.Callback], steps: int) -> tuple[list[float], float]:
    """Losses, and the median time from step to step in milliseconds."""
    data = torch.randint(0, 1000, (4 * steps, 64), generator=torch.Generator().manual_seed(1))
    module = Language(kind)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(module, DataLoader(data, batch_size=4))
    gaps = [after - before for before, after in zip(module.times, module.times[1:], strict=False)]
    return module.losses, 1000 * statistics.median(gaps)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    steps = parser.parse_args().steps
    warnings.simplefilter("ignore")
    for kind in ("GPT-2 shape", "Lightning demo"):
        plain, plain_ms = train(kind, [], steps)
        fused, fused_ms = train(kind, [Fuse()], steps)
        gap = max(abs(a - b) for a, b in zip(plain, fused, strict=True))
        print(f"{kind}: {plain_ms:.1f} ms per step, with Fuse {fused_ms:.1f} ms; losses differ by at most {gap:.1e}")


if __name__ == "__main__":
    main()
