# SPDX-License-Identifier: Apache-2.0
"""The optimizer part of a training step over sharded parameters (DTensor, as FSDP2 makes them), in several processes.

Ours and torch's fused AdamW with `clip_grad_norm_` are called alternately, in every process the same number of times,
and every call is timed from one barrier to the end of the slowest process.

Usage: python benchmarks/bench_sharded.py [--processes 2] [--calls 60] [--save]
"""

import argparse
import math
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.multiprocessing
from harness import Row, ratio, report
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm, ClipPerTensor, ClipUnitwise
from lightning_optkit.optimizers import AdamW

Step = Callable[[], object]

NUM_TENSORS, SHAPE = 150, (64, 64)
CASE = f"{NUM_TENSORS} x {SHAPE}"
DECAY, MAX_NORM = 0.999, 1e-3
TORCH, TORCH_EMA, GLOBAL = "torch fused + clip_grad_norm_", "torch fused + clip_grad_norm_ + EMA", "AdamW + clip"
# variant -> baseline, target (the ratio of their times), bytes per element
COMPARISONS = {
    GLOBAL: (TORCH, 8.0, 32),
    "AdamW + clip + EMA": (TORCH_EMA, 10.0, 40),
    "AdamW + per-tensor clip": (GLOBAL, 1 / 1.5, 32),
    "AdamW + unitwise clip": (GLOBAL, None, 40),
}


def parameters() -> list[nn.Parameter]:
    """Fresh sharded parameters with gradients."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def sharded(scale: float) -> DTensor:
        return distribute_tensor(torch.randn(SHAPE) * scale, mesh, [Shard(0)])

    params = [nn.Parameter(sharded(1.0)) for _ in range(NUM_TENSORS)]
    for p in params:
        p.grad = sharded(1e-3)
    return params


def torchs(params: list[nn.Parameter], average: bool) -> Step:
    """The best that torch offers: fused step, foreach clip, foreach average over the local shards."""
    optimizer = torch.optim.AdamW(params, fused=True)
    shards: list[Tensor] = [p.detach().to_local() for p in params]  # type: ignore[attr-defined]
    averages = [shard.clone() for shard in shards]

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        optimizer.step()
        if average:
            torch._foreach_lerp_(averages, shards, 1 - DECAY)

    return step


def steps() -> dict[str, Step]:
    """Every variant, over parameters of its own."""
    return {
        TORCH: torchs(parameters(), average=False),
        TORCH_EMA: torchs(parameters(), average=True),
        GLOBAL: AdamW(parameters(), clip=ClipNorm(MAX_NORM)).step,
        "AdamW + clip + EMA": AdamW(parameters(), clip=ClipNorm(MAX_NORM), average=EMA(DECAY)).step,
        "AdamW + per-tensor clip": AdamW(parameters(), clip=ClipPerTensor(MAX_NORM)).step,
        "AdamW + unitwise clip": AdamW(parameters(), clip=ClipUnitwise(1e-4)).step,
    }


def timed(call: Step) -> float:
    """Seconds until the slowest process is done."""
    dist.barrier()
    start = time.perf_counter()
    call()
    took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took)


def rows(times: dict[str, list[float]]) -> Iterator[Row]:
    """One row for each comparison."""
    elements = NUM_TENSORS * math.prod(SHAPE)
    for variant, (baseline, target, width) in COMPARISONS.items():
        low, median, high = statistics.quantiles(times[variant], n=4)
        moved = width * elements
        yield Row(
            benchmark="sharded",
            case=f"{CASE} DTensors, {dist.get_world_size()} processes",
            variant=variant,
            baseline=baseline,
            threads=torch.get_num_threads(),
            median_ms=round(1e3 * median, 4),
            iqr_ms=round(1e3 * (high - low), 4),
            ratio=round(ratio(times[baseline], times[variant]), 3),
            megabytes=round(moved / 1e6, 2),
            gb_per_s=round(moved / median / 1e9, 2),
            share_of_copy=float("nan"),
            target=target,
        )


def run(rank: int, processes: int, port: int, calls: int, save: bool) -> None:
    """One process."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    variants = steps()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(calls // 3 + 1):
        for name, call in variants.items():
            call()  # each variant finds its own data in the caches, as in a run with one optimizer
            measured = [timed(call) for _ in range(3)]
            times[name] += measured if turn > 0 else []
    if rank == 0:
        report(rows(times), save)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--calls", type=int, default=60, help="measured calls of each variant")
    parser.add_argument("--save", action="store_true", help="add the rows to benchmarks/results/")
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run, (given.processes, port, given.calls, given.save), given.processes)


if __name__ == "__main__":
    main()
