# SPDX-License-Identifier: Apache-2.0
"""The optimizer part of a training step over sharded parameters (DTensor, as FSDP2 makes them), in several processes.

Ours and torch's fused AdamW with `clip_grad_norm_` take turns, in every process the same number of calls. A turn is one
unmeasured call and then five measured ones, without a barrier between them, as in a training.

Usage: python benchmarks/bench_sharded.py [--processes 2] [--turns 20] [--save]
"""

import argparse
import math
import os
import socket
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.multiprocessing
from harness import Row, copy_bandwidth, ratio, report, seconds
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm, ClipPerTensor, ClipUnitwise
from lightning_optkit.optimizers import AdamW

Step = Callable[[], object]

NUM_TENSORS, SHAPE = 150, (64, 64)
CASE = f"{NUM_TENSORS} x {SHAPE}"
DECAY, MAX_NORM = 0.999, 1e-3
TORCH = "torch fused + clip_grad_norm_"
AVERAGED, LERP = f"{TORCH} + AveragedModel", f"{TORCH} + _foreach_lerp_ of shards"
GLOBAL, WITH_EMA = "AdamW + clip", "AdamW + clip + EMA"
# variant, baseline, target (the ratio of their times), bytes per element
COMPARISONS = [
    (GLOBAL, TORCH, 8.0, 32),
    (WITH_EMA, AVERAGED, 10.0, 40),
    (WITH_EMA, LERP, None, 40),
    ("AdamW + per-tensor clip", GLOBAL, 1 / 1.5, 32),
    ("AdamW + unitwise clip", GLOBAL, None, 40),
]
PER_TURN = 5


def parameters() -> list[nn.Parameter]:
    """Fresh sharded parameters with gradients."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def sharded(scale: float) -> DTensor:
        return distribute_tensor(torch.randn(SHAPE) * scale, mesh, [Shard(0)])

    params = [nn.Parameter(sharded(1.0)) for _ in range(NUM_TENSORS)]
    for p in params:
        p.grad = sharded(1e-3)
    return params


def torchs(params: list[nn.Parameter], average: Step | None = None) -> Step:
    """Torch's fused step and foreach clip, and then an average."""
    optimizer = torch.optim.AdamW(params, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        optimizer.step()
        if average is not None:
            average()

    return step


def averaged(params: list[nn.Parameter]) -> Step:
    """The average of `AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))`."""
    update = get_ema_multi_avg_fn(DECAY)
    averages, detached = [p.detach().clone() for p in params], [p.detach() for p in params]
    return lambda: update(averages, detached, 1)


def lerp_of_shards(params: list[nn.Parameter]) -> Step:
    """The same over the local shards, written by hand."""
    shards: list[Tensor] = [p.detach().to_local() for p in params]  # type: ignore[attr-defined]
    averages = [shard.clone() for shard in shards]
    return lambda: torch._foreach_lerp_(averages, shards, 1 - DECAY)


def steps() -> dict[str, Step]:
    """Every variant, over parameters of its own."""
    own = [parameters() for _ in range(3)]
    return {
        TORCH: torchs(own[0]),
        AVERAGED: torchs(own[1], averaged(own[1])),
        LERP: torchs(own[2], lerp_of_shards(own[2])),
        GLOBAL: AdamW(parameters(), clip=ClipNorm(MAX_NORM)).step,
        WITH_EMA: AdamW(parameters(), clip=ClipNorm(MAX_NORM), average=EMA(DECAY)).step,
        "AdamW + per-tensor clip": AdamW(parameters(), clip=ClipPerTensor(MAX_NORM)).step,
        "AdamW + unitwise clip": AdamW(parameters(), clip=ClipUnitwise(1e-4)).step,
    }


def rows(times: dict[str, list[float]], bandwidth: float) -> Iterator[Row]:
    """One row for each comparison; bytes are those of one process."""
    elements = NUM_TENSORS * math.prod(SHAPE) / dist.get_world_size()
    for variant, baseline, target, width in COMPARISONS:
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
            share_of_copy=round(moved / median / 1e9 / bandwidth, 3),
            target=target,
        )


def run(rank: int, processes: int, port: int, turns: int, save: bool) -> None:
    """One process."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    bandwidth = copy_bandwidth() if rank == 0 else math.nan
    variants = steps()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns + 1):
        for name, call in variants.items():
            dist.barrier()
            call()
            measured = [seconds(call) for _ in range(PER_TURN)]
            times[name] += measured if turn > 0 else []
    if rank == 0:
        report(rows(times, bandwidth), save)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--turns", type=int, default=20, help="of five measured calls of each variant")
    parser.add_argument("--save", action="store_true", help="add the rows to benchmarks/results/")
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run, (given.processes, port, given.turns, given.save), given.processes)


if __name__ == "__main__":
    main()
