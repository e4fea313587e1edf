# SPDX-License-Identifier: Apache-2.0
"""Bytes per parameter while training: peak memory of a whole fit, each variant in a process of its own.

The model is a chain of square layers on one sample, so that activations are negligible. A variant's figure is its peak
resident memory, less what was resident before the model was created (after a fit of one layer, which loads and warms up
everything), per parameter. Gradients, Lightning's loop and the temporaries of the step are in it. glibc is told to
return freed memory at once (MALLOC_MMAP_THRESHOLD_); it would otherwise keep up to 2 bytes per parameter, by chance.

Usage: python benchmarks/bench_memory.py [--millions 50] [--variants NAME ...] [--markdown]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WIDTH = 1024


@dataclass(frozen=True)
class Variant:
    """One row.

    Args:
        precision: That of the Trainer.
        own: Arguments of our AdamW; None is torch's, fused.
        fuses: Whether `Fuse` converts torch's, and converts it back after the fit, with the state in torch's dtypes.
        releases: Whether gradients are released in the backward pass.
        averages: Whether the step keeps an EMA, in bf16.
        target: Most bytes per parameter.
    """

    precision: str
    own: dict[str, Any] | None
    fuses: bool = False
    releases: bool = False
    averages: bool = False
    target: float | None = None


NARROW = dict(rounding="split24", state_dtype="int8")
VARIANTS = {
    "torch fused, fp32": Variant("32-true", None, target=16.0),
    "fp32": Variant("32-true", {}, target=16.0),
    "fp32, by Fuse": Variant("32-true", {}, fuses=True, target=16.0),
    "fp32, released": Variant("32-true", {}, releases=True),
    "bf16 + split32, fp32 state": Variant("bf16-true", dict(rounding="split32")),
    "bf16 + split24 + int8": Variant("bf16-true", NARROW, target=7.1),
    "bf16 + split24 + int8, by Fuse": Variant("bf16-true", NARROW, fuses=True),
    "bf16 + split24 + int8, released": Variant("bf16-true", NARROW, releases=True, target=5.2),
    "bf16 + split24 + int8, released, EMA": Variant("bf16-true", NARROW, releases=True, averages=True, target=7.2),
}


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most bytes of this process in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, millions: float) -> dict[str, Any]:
    """Runs one variant in this process."""
    variant = VARIANTS[name]
    fit_once(variant, 1, WIDTH)
    before = resident()
    if peak() - before > 64 << 20:
        raise RuntimeError(f"bench_memory: {peak() - before} bytes above the baseline before the model was created.")
    layers = max(round(millions * 1e6 / WIDTH**2), 1)
    count = fit_once(variant, layers, WIDTH)
    return dict(
        benchmark="memory",
        variant=name,
        parameters=count,
        baseline_mb=round(before / 1e6, 1),
        peak_mb=round(peak() / 1e6, 1),
        bytes_per_parameter=round((peak() - before) / count, 2),
        target=variant.target,
    )


def fit_once(variant: Variant, layers: int, width: int) -> int:
    """Trains a chain of layers for three steps; returns its number of parameters."""
    import lightning.pytorch as pl
    import torch
    from torch import nn

    from lightning_optkit.averaging import EMA
    from lightning_optkit.callbacks import Fuse, ReleaseGradients, WeightAveraging
    from lightning_optkit.optimizers import AdamW

    class Chain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            dtype = torch.bfloat16 if variant.precision == "bf16-true" else torch.float32
            layer: Callable[[], nn.Module] = lambda: nn.Linear(width, width, bias=False, dtype=dtype)  # noqa: E731
            self.net = nn.Sequential(*(layer() for _ in range(layers)))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss: Any = self.net(batch[0].to(self.dtype)).float().square().mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            if variant.own is None or variant.fuses:
                return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)
            return AdamW(self.parameters(), lr=1e-4, **variant.own)

    callbacks: list[pl.Callback] = [Fuse(verbose=False, **variant.own or {})] if variant.fuses else []
    callbacks += [WeightAveraging(EMA(0.999, dtype=torch.bfloat16), evaluate=False)] if variant.averages else []
    callbacks += [ReleaseGradients()] if variant.releases else []
    quiet: dict[str, Any] = dict(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer = pl.Trainer(
        callbacks=callbacks, max_steps=3, accelerator="cpu", devices=1, precision=variant.precision, **quiet
    )
    module = Chain()
    data = torch.utils.data.TensorDataset(torch.randn(3, width))
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=1))
    return sum(p.numel() for p in module.parameters())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| variant | bytes / parameter | goal |", "|---|---|---|"]
    for row in rows:
        goal = "" if row["target"] is None else f"<= {row['target']:g}"
        lines.append(f"| {row['variant']} | {row['bytes_per_parameter']:.2f} | {goal} |")
    return "\n".join(lines)


def main() -> None:
    """Measures every variant, and prints one JSON row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=50.0)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--markdown", action="store_true", help="print a table instead")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process, not in its own
    options = parser.parse_args()
    if options.here:
        warnings.filterwarnings("ignore")
        print(json.dumps(measure(options.variants[0], options.millions)))
        return
    rows = []
    for name in options.variants:
        own = [sys.executable, __file__, "--here", "--millions", str(options.millions), "--variants", name]
        done = subprocess.run(
            own, capture_output=True, text=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
        )
        if done.returncode:
            raise RuntimeError(f"bench_memory: {name} failed.\n{done.stderr}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        if not options.markdown:
            print(json.dumps(rows[-1]), flush=True)
    if options.markdown:
        print(table(rows))


if __name__ == "__main__":
    main()
