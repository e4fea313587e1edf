# SPDX-License-Identifier: Apache-2.0
"""The step on a GPU: AdamW alone and with clip and EMA, against torch, by size and number of tensors; JSON rows.

Times are medians of device time between events, the two variants in turn; every case exceeds the last-level cache but
where it is about many small tensors. `share_of_copy` is relative to the copy bandwidth measured in the same run.

Usage: python benchmarks/bench_gpu.py [--output FOLDER] [--turns 20]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import AdamW

Step = Callable[[], object]
CASES = {
    "4 M in 10": (4_000_000, 10),
    "4 M in 1000": (4_000_000, 1_000),
    "25 M in 160": (25_000_000, 160),
    "124 M in 148": (124_000_000, 148),
    "124 M in 10000": (124_000_000, 10_000),
    "1 G in 300": (1_000_000_000, 300),
}


def parameters(total: int, count: int) -> nn.ParameterList:
    """Fresh parameters with gradients."""
    params = nn.ParameterList(torch.randn(total // count, device="cuda") for _ in range(count))
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def tail(params: nn.ParameterList) -> Step:
    """Clip, AdamW and EMA in one pass."""
    return AdamW(params, clip=ClipNorm(1e-3), average=EMA(0.999)).step


def torch_tail(params: nn.ParameterList) -> Step:
    """The best that torch offers."""
    optimizer = torch.optim.AdamW(params, fused=True)
    averages = [p.detach().clone() for p in params]
    detached: list[Tensor] = [p.detach() for p in params]

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1e-3, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(averages, detached, 1 - 0.999)

    return step


COMPARISONS = [
    ("AdamW + clip + EMA", tail, "torch fused + foreach clip + foreach EMA", torch_tail, 40),
    ("AdamW", lambda params: AdamW(params).step,
     "torch fused", lambda params: torch.optim.AdamW(params, fused=True).step, 28),
    ("AdamW", lambda params: AdamW(params).step, "torch foreach", lambda params: torch.optim.AdamW(params).step, 28),
]  # fmt: skip


def milliseconds(step: Step) -> float:
    """Device time of one call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_bandwidth() -> float:
    """GB/s of `Tensor.copy_`, read and write counted."""
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    median = statistics.median(milliseconds(lambda: target.copy_(source)) for _ in range(20))
    return 2 * source.numel() * 4 / median / 1e6


def main() -> None:
    """Runs every comparison that fits into the device's memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--turns", type=int, default=20)
    arguments = parser.parse_args()
    properties, bandwidth = torch.cuda.get_device_properties(0), copy_bandwidth()
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": properties.name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copy_gb_per_s": round(bandwidth, 1),
    }
    rows = []
    for case, (total, count) in CASES.items():
        if 2 * 20 * total > 0.8 * properties.total_memory:
            continue
        for variant, ours, baseline, theirs, num_bytes in COMPARISONS:
            steps = [ours(parameters(total, count)), theirs(parameters(total, count))]
            for step in steps * 2:
                step()
            turns = [[milliseconds(step) for step in steps] for _ in range(arguments.turns)]
            mine = statistics.median(turn[0] for turn in turns)
            rate = num_bytes * total / mine / 1e6
            row = {
                "benchmark": "gpu step", "case": case, "variant": variant, "baseline": baseline,
                "median_ms": round(mine, 4), "ratio": round(statistics.median(b / a for a, b in turns), 3),
                "gb_per_s": round(rate, 1), "share_of_copy": round(rate / bandwidth, 3), **facts,
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
            del steps
            torch.cuda.empty_cache()
    path = arguments.output / f"{facts['date']}-gpu-step-{properties.name.replace(' ', '-').lower()}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
