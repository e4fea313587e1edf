# SPDX-License-Identifier: Apache-2.0
"""LayerNorm, RMSNorm and their residual forms: ours against torch's, over a grid of shapes.

A model runs `backward` once for many norms, and its Python costs as much as several short ones. So up to CHAINED
elements, CHAIN norms are measured one behind the other in one graph, and a time is that of one of them; `--chain 1`
measures each alone. A transposed input is measured alone at any size, since what a norm gives is contiguous.

Usage: python benchmarks/bench_norms.py [--quick | --middle] [--seconds 0.03] [--threads 1 2] [--chain 8] [--save]
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Row, copy_bandwidths, interleaved, progress, ratio, report
from torch import Tensor, nn

from lightning_optkit.layers import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm

Call = Callable[[], object]
ROWS, COLUMNS = (1, 7, 128, 4096, 65536), (1, 3, 64, 255, 256, 768, 1024, 4096, 8192)
QUICK_ROWS, QUICK_COLUMNS = (1, 128, 4096), (3, 255, 1024)
# Tensors of 0.6 to 9 MB, at the edge of the caches.
MIDDLE_ROWS, MIDDLE_COLUMNS = (512, 1000, 2048, 3000), (320, 384, 512, 768)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHAIN, CHAINED = 8, 1 << 17
MAX_BYTES = 1 << 28  # of one tensor: larger ones take minutes per cell and tell nothing new


class TorchAdd(nn.Module):
    """`norm(x + residual)` and the sum, as models write it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm, sum)."""
        total = x + residual
        return self.norm(total), total


@dataclass(frozen=True)
class Kind:
    """What is compared; arrays read or written per element, forward and backward; target for the geometric mean."""

    name: str
    ours: Callable[..., nn.Module]
    theirs: Callable[..., nn.Module]
    adds: bool
    forward: int
    backward: int
    target: float


KINDS = [
    Kind("LayerNorm", LayerNorm, nn.LayerNorm, False, 2, 3, 2.5),
    Kind("RMSNorm", RMSNorm, nn.RMSNorm, False, 2, 3, 8.0),
    Kind("AddLayerNorm", AddLayerNorm, lambda n, dtype: TorchAdd(nn.LayerNorm(n, dtype=dtype)), True, 4, 4, 3.0),
    Kind("AddRMSNorm", AddRMSNorm, lambda n, dtype: TorchAdd(nn.RMSNorm(n, dtype=dtype)), True, 4, 4, 3.0),
]


def inputs(kind: Kind, rows: int, columns: int, dtype: torch.dtype, contiguous: bool) -> list[Tensor]:
    """X (and residual), then a gradient for each output."""
    made = [torch.randn(rows, columns).to(dtype) for _ in range(4 if kind.adds else 2)]
    leaves = made[: len(made) // 2]
    if not contiguous:  # the transpose of a batch-last tensor
        leaves = [t.t().contiguous().t() for t in leaves]
    return [t.requires_grad_() for t in leaves] + made[len(made) // 2 :]


def calls(modules: list[nn.Module], tensors: list[Tensor], phase: str) -> Call:
    """Forward, backward, or both, of all modules in a row."""
    half = len(tensors) // 2
    xs, grads = tensors[:half], tensors[half:]
    leaves = [*xs, *(p for module in modules for p in module.parameters())]

    def forward() -> list[Tensor]:
        outputs = xs
        for module in modules:
            found = module(*outputs)
            outputs = list(found) if isinstance(found, tuple) else [found]
        return outputs

    def both() -> object:
        return torch.autograd.grad(forward(), leaves, grads)

    if phase == "forward":
        return forward
    if phase == "forward+backward":
        return both
    outputs = forward()
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def measure(
    kind: Kind,
    case: tuple[int, int, str, bool],
    phase: str,
    threads: int,
    seconds: float,
    bandwidth: float,
    chain: int,
) -> Row:
    """One row."""
    torch.set_num_threads(threads)
    rows, columns, dtype_name, contiguous = case
    dtype = DTYPES[dtype_name]
    tensors = inputs(kind, rows, columns, dtype, contiguous)
    count = chain if contiguous and rows * columns <= CHAINED else 1
    variants = {
        name: calls([make(columns, dtype=dtype) for _ in range(count)], tensors, phase)
        for name, make in (("ours", kind.ours), ("theirs", kind.theirs))
    }
    times = {name: [t / count for t in found] for name, found in interleaved(variants, seconds).items()}
    low, median, high = statistics.quantiles(times["ours"], n=4)
    arrays = {"forward": kind.forward, "backward": kind.backward, "forward+backward": kind.forward + kind.backward}
    moved = arrays[phase] * rows * columns * dtype.itemsize
    return Row(
        benchmark="norms",
        case=f"{rows} x {columns} {dtype_name}{'' if contiguous else ' transposed'}, {phase}",
        variant=kind.name,
        baseline="torch",
        threads=torch.get_num_threads(),
        median_ms=round(1e3 * median, 4),
        iqr_ms=round(1e3 * (high - low), 4),
        ratio=round(ratio(times["theirs"], times["ours"]), 3),
        megabytes=round(moved / 1e6, 3),
        gb_per_s=round(moved / median / 1e9, 2),
        share_of_copy=round(moved / median / 1e9 / bandwidth, 3),
        target=1.0,
    )


def summaries(rows: list[Row]) -> list[str]:
    """Geometric mean and worst cell, per kind, dtype, phase and threads."""
    lines = []
    for kind in KINDS:
        for threads, phase in itertools.product(
            sorted({r.threads for r in rows}), ("forward", "backward", "forward+backward")
        ):
            group = [
                r for r in rows if (r.variant, r.threads) == (kind.name, threads) and r.case.endswith(f", {phase}")
            ]
            if not group:
                continue
            worst = min(group, key=lambda r: r.ratio)
            mean = statistics.geometric_mean(r.ratio for r in group)
            lines.append(
                f"{kind.name:13} {threads} thread(s) {phase:17} geometric mean {mean:6.2f}x"
                f" (target {kind.target:g}), worst {worst.ratio:.2f}x at {worst.case}"
            )
    return lines


def settle_allocator() -> None:
    """As in a process that has freed something of many MiB before.

    Until then glibc gives freed memory back to the system at sizes of its own choice, and the page faults of the next
    call, ten times as long as a norm, hit one variant or the other by chance. From 32 MiB on it always does.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def main() -> None:
    """Runs the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=0.03, help="time per cell; a cell takes at least 6 calls, 3 if long"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kinds", nargs="+", default=[k.name for k in KINDS], choices=[k.name for k in KINDS])
    parser.add_argument("--chain", type=int, default=CHAIN, help="short norms in one graph")
    parser.add_argument("--phases", nargs="+", default=["forward", "backward", "forward+backward"])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--layouts", nargs="+", default=["contiguous", "transposed"])
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--columns", type=int, nargs="+")
    parser.add_argument("--max-bytes", type=int, default=MAX_BYTES, help="skip larger tensors")
    parser.add_argument("--min-bytes", type=int, default=0, help="skip tensors of no more")
    grids = parser.add_mutually_exclusive_group()
    grids.add_argument("--quick", action="store_true", help="a ninth of the grid")
    grids.add_argument("--middle", action="store_true", help="sizes at the edge of the caches instead")
    parser.add_argument("--save", action="store_true", help="keep the rows under benchmarks/results/")
    a = parser.parse_args()
    rows_axis = a.rows or (QUICK_ROWS if a.quick else MIDDLE_ROWS if a.middle else ROWS)
    columns_axis = a.columns or (QUICK_COLUMNS if a.quick else MIDDLE_COLUMNS if a.middle else COLUMNS)
    settle_allocator()
    bandwidths = copy_bandwidths(a.threads)
    grid = itertools.product(rows_axis, columns_axis, a.dtypes, [layout == "contiguous" for layout in a.layouts])
    cases = [case for case in grid if a.min_bytes < case[0] * case[1] * DTYPES[case[2]].itemsize <= a.max_bytes]
    kinds = [kind for kind in KINDS if kind.name in a.kinds]
    cells = list(itertools.product(a.threads, cases, kinds, a.phases))
    rows = (
        measure(kind, case, phase, threads, a.seconds, bandwidths[threads], a.chain)
        for threads, case, kind, phase in progress(cells)
    )
    print("\n".join(summaries(report(rows, a.save))))


if __name__ == "__main__":
    main()
