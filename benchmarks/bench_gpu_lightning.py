# SPDX-License-Identifier: Apache-2.0
"""A GPT-2-shaped model of 124 M parameters trained by Lightning in bf16-mixed, with and without us; JSON rows.

Usage: python benchmarks/bench_gpu_lightning.py [--output FOLDER] [--minutes 2] [--dry-run]
"""

import logging
import statistics
import time
import warnings
from itertools import pairwise

import lightning.pytorch as pl
import torch
from gpu_harness import Bench, free
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import Fuse, GradientClipping, WeightAveraging
from lightning_optkit.clipping import ClipNorm

WARMUP = 6  # steps at the start of a run that do not count


class Block(nn.Module):
    """One layer of GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Attention and a perceptron, each behind a norm."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT2(pl.LightningModule):
    """GPT-2 small; remembers when each step began, on the device's clock."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.times: list[float] = []
        self.losses: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Next-token loss of one batch."""
        if batch.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        x = self.tokens(batch[:, :-1]) + self.places.weight[: batch.shape[1] - 1]
        logits = self.head(self.norm(self.blocks(x)))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Torch's default AdamW: what a user writes."""
        return torch.optim.AdamW(self.parameters(), lr=3e-4, weight_decay=0.1)


def variants() -> dict[str, tuple[list[Callback], dict[str, float]]]:
    """Callbacks and arguments of the Trainer."""
    theirs: dict[str, tuple[list[Callback], dict[str, float]]] = {}
    if hasattr(lightning_callbacks, "EMAWeightAveraging"):  # since lightning 2.6
        average = lightning_callbacks.EMAWeightAveraging(decay=0.999)
        theirs["AdamW, gradient_clip_val, EMAWeightAveraging"] = [average], {"gradient_clip_val": 1.0}
    return {
        "Fuse() + clip + EMA": (
            [Fuse(verbose=False), GradientClipping(ClipNorm(1.0)), WeightAveraging(EMA(0.999))],
            {},
        ),
        **theirs,
        "AdamW": ([], {}),
        "Fuse()": ([Fuse(verbose=False)], {}),
    }


def train(bench: Bench, name: str, steps: int) -> None:
    """One run, one row."""
    length, batch = (17, 2) if bench.dry else (1025, 16)
    model = GPT2(100, 16, 32, 2, 2) if bench.dry else GPT2(50304, 1024, 768, 12, 12)
    vocabulary = model.tokens.num_embeddings
    data = torch.randint(0, vocabulary, (batch * steps, length), generator=torch.Generator().manual_seed(1))
    callbacks, arguments = variants()[name]
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu" if bench.dry else "gpu", devices=1, precision="bf16-mixed",
        callbacks=callbacks, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, **arguments,
    )  # fmt: skip
    if not bench.dry:
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(model, DataLoader(data, batch_size=batch, pin_memory=not bench.dry))
    seconds = statistics.median(after - before for before, after in pairwise(model.times[WARMUP:]))
    size = sum(p.numel() for p in model.parameters()) / 1e6
    bench.row(
        benchmark="gpu lightning", case=f"GPT-2, {size:.0f} M", variant=name,
        precision="bf16-mixed", batch=batch, length=length - 1, median_ms=round(1000 * seconds, 2),
        tokens_per_s=round(batch * (length - 1) / seconds),
        peak_gb=0.0 if bench.dry else round(torch.cuda.max_memory_allocated() / 1e9, 2),
        first_loss=round(float(model.losses[0]), 4), last_loss=round(float(model.losses[-1]), 4),
    )  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    torch.set_float32_matmul_precision("high")
    bench = Bench("gpu-lightning", __doc__, ["gpt2"])
    for name in variants():
        if bench.has_time():
            train(bench, name, steps=12 if bench.dry else 40)
            free()


if __name__ == "__main__":
    main()
