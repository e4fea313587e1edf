# SPDX-License-Identifier: Apache-2.0
"""Norms over the channels of images against torch's function between two permutations, as timm has it.

Forward and backward of one layer, for the stages of a ConvNeXt-T at 224 pixels, in both memory formats.

Usage: python benchmarks/bench_norms2d.py [--seconds 1] [--threads 1 2] [--batch 8] [--save]
"""

import argparse
import statistics
from collections.abc import Callable, Iterator

import torch
from harness import Row, copy_bandwidths, interleaved, progress, ratio, report
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_optkit.layers import LayerNorm2d, RMSNorm2d

STAGES = [(96, 56), (192, 28), (384, 14), (768, 7)]  # channels, pixels
FORMATS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


class PermutedLayerNorm(nn.LayerNorm):
    """torch's layer norm on the channels."""

    def forward(self, input: Tensor) -> Tensor:
        """Of (N, C, H, W)."""
        rows = input.permute(0, 2, 3, 1)
        return F.layer_norm(rows, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class PermutedRMSNorm(nn.RMSNorm):
    """torch's RMS norm on the channels."""

    def forward(self, x: Tensor) -> Tensor:
        """Of (N, C, H, W)."""
        rows = x.permute(0, 2, 3, 1)
        return F.rms_norm(rows, self.normalized_shape, self.weight, self.eps).permute(0, 3, 1, 2)


LAYERS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "LayerNorm2d": (LayerNorm2d, PermutedLayerNorm),
    "RMSNorm2d": (RMSNorm2d, PermutedRMSNorm),
}


def both_passes(layer: nn.Module, x: Tensor, d_out: Tensor) -> Callable[[], None]:
    """A call of forward and backward."""

    def call() -> None:
        x.grad = None
        layer(x).backward(d_out)

    return call


def measure(
    name: str, batch: int, stage: tuple[int, int], order: str, threads: int, bandwidth: float, budget_s: float
) -> Iterator[Row]:
    """One row: ours against torch's."""
    torch.set_num_threads(threads)
    channels, pixels = stage
    shape = (batch, channels, pixels, pixels)
    x = torch.randn(shape).contiguous(memory_format=FORMATS[order]).requires_grad_()
    d_out = torch.randn(shape).contiguous(memory_format=FORMATS[order])
    ours, theirs = (cls(channels) for cls in LAYERS[name])
    times = interleaved({"ours": both_passes(ours, x, d_out), "torch": both_passes(theirs, x, d_out)}, budget_s)
    low, median, high = statistics.quantiles(times["ours"], n=4)
    moved = 5 * 4 * x.numel()  # x twice, its gradient, the result, its gradient
    yield Row(
        benchmark="norms2d",
        case=f"{' x '.join(map(str, shape))}, {order}",
        variant=name,
        baseline="torch, permuted",
        threads=threads,
        median_ms=round(1e3 * median, 4),
        iqr_ms=round(1e3 * (high - low), 4),
        ratio=round(ratio(times["torch"], times["ours"]), 3),
        megabytes=round(moved / 1e6, 3),
        gb_per_s=round(moved / median / 1e9, 2),
        share_of_copy=round(moved / median / 1e9 / bandwidth, 3),
        target=None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="time per case")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--save", action="store_true", help="keep the rows under benchmarks/results/")
    given = parser.parse_args()
    bandwidths = copy_bandwidths(given.threads)
    cases = [
        (name, stage, order, threads)
        for threads in given.threads
        for name in LAYERS
        for stage in STAGES
        for order in FORMATS
    ]
    report(
        (
            row
            for name, stage, order, threads in progress(cases)
            for row in measure(name, given.batch, stage, order, threads, bandwidths[threads], given.seconds)
        ),
        given.save,
    )


if __name__ == "__main__":
    main()
