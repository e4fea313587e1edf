# SPDX-License-Identifier: Apache-2.0
"""The optimizer part of a training step: ours, torch's fastest, and Lightning's default.

The two variants of a comparison are called alternately, on separate parameters. DeepSpeed's CPU Adam is included if
installed (`pip install --no-build-isolation deepspeed`); it compiles at its first use.

Usage: python benchmarks/bench_step.py [--seconds 3] [--threads 1 2] [--save]
"""

import argparse
import importlib.util
import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Row, copy_bandwidths, interleaved, progress, ratio, report
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import SGD, AdamW

Step = Callable[[], object]

CASES = {
    "150 x (64, 64)": [(64, 64)] * 150,
    "32 x (1024, 1024)": [(1024, 1024)] * 32,
    "2 x (4096, 4096)": [(4096, 4096)] * 2,
}
SMALL = "150 x (64, 64)"
DECAY, MAX_NORM = 0.999, 1e-3


def parameters(shapes: list[tuple[int, ...]]) -> nn.ParameterList:
    """Fresh parameters with gradients."""
    params = nn.ParameterList(torch.randn(shape) for shape in shapes)
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def tail(params: nn.ParameterList) -> Step:
    """Clip, AdamW and EMA in one pass."""
    return AdamW(params, clip=ClipNorm(MAX_NORM), average=EMA(DECAY)).step


def torch_fused_tail(params: nn.ParameterList) -> Step:
    """The best that torch offers: fused step, foreach clip, foreach EMA."""
    optimizer = torch.optim.AdamW(params, fused=True)
    averages = [p.detach().clone() for p in params]
    detached: list[Tensor] = [p.detach() for p in params]

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(averages, detached, 1 - DECAY)

    return step


def lightning_default_tail(params: nn.ParameterList) -> Step:
    """`torch.optim.AdamW(...)`, `Trainer(gradient_clip_val=...)`, `EMAWeightAveraging()`, nothing chosen."""
    optimizer = torch.optim.AdamW(params)
    average = AveragedModel(params, use_buffers=True, avg_fn=get_ema_avg_fn(DECAY))

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        average.update_parameters(params)

    return step


def deepspeed_step(params: nn.ParameterList) -> Step:
    """DeepSpeed's AdamW for CPU."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    step: Step = DeepSpeedCPUAdam(list(params), adamw_mode=True).step
    return step


@dataclass(frozen=True)
class Comparison:
    """Ours against theirs; targets by (is the case small, threads)."""

    variant: str
    ours: Callable[[nn.ParameterList], Step]
    baseline: str
    theirs: Callable[[nn.ParameterList], Step]
    bytes_per_element: int
    targets: dict[tuple[bool, int], float]


NEVER_SLOWER = {(small, threads): 1.0 for small in (True, False) for threads in (1, 2)}
COMPARISONS = [
    Comparison(
        "AdamW + clip + EMA", tail, "torch fused + foreach clip + foreach EMA", torch_fused_tail, 40,
        {(True, 1): 10.0, (True, 2): 10.0, (False, 1): 1.2, (False, 2): 1.6},
    ),
    Comparison(
        "AdamW + clip + EMA", tail, "torch default + clip + EMAWeightAveraging", lightning_default_tail, 40,
        {(True, 1): 30.0, (True, 2): 30.0, (False, 1): 3.0, (False, 2): 3.0},
    ),
    Comparison(
        "AdamW", lambda params: AdamW(params).step,
        "torch AdamW(fused=True)", lambda params: torch.optim.AdamW(params, fused=True).step, 28, NEVER_SLOWER,
    ),
    Comparison(
        "AdamW", lambda params: AdamW(params).step,
        "torch AdamW()", lambda params: torch.optim.AdamW(params).step, 28, NEVER_SLOWER,
    ),
    Comparison(
        "SGD(momentum)", lambda params: SGD(params, momentum=0.9).step,
        "torch SGD(momentum, fused=True)",
        lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, fused=True).step, 20, NEVER_SLOWER,
    ),
]  # fmt: skip
if importlib.util.find_spec("deepspeed"):
    targets = {(small, threads): 8.0 if small else 1.3 for small in (True, False) for threads in (1, 2)}
    COMPARISONS.append(
        Comparison("AdamW", lambda params: AdamW(params).step, "DeepSpeedCPUAdam", deepspeed_step, 28, targets)
    )


def measure(comparison: Comparison, case: str, threads: int, seconds: float, bandwidth: float) -> Row:
    """One row."""
    torch.set_num_threads(threads)
    shapes = CASES[case]
    ours, theirs = comparison.ours(parameters(shapes)), comparison.theirs(parameters(shapes))
    times = interleaved({"ours": ours, "theirs": theirs}, seconds)
    low, median, high = statistics.quantiles(times["ours"], n=4)
    moved = comparison.bytes_per_element * sum(torch.Size(shape).numel() for shape in shapes)
    return Row(
        benchmark="step",
        case=case,
        variant=comparison.variant,
        baseline=comparison.baseline,
        threads=torch.get_num_threads(),
        median_ms=round(1e3 * median, 4),
        iqr_ms=round(1e3 * (high - low), 4),
        ratio=round(ratio(times["theirs"], times["ours"]), 3),
        megabytes=round(moved / 1e6, 2),
        gb_per_s=round(moved / median / 1e9, 2),
        share_of_copy=round(moved / median / 1e9 / bandwidth, 3),
        target=comparison.targets.get((case == SMALL, threads)),
    )


def main() -> None:
    """Runs every comparison on every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="time per comparison")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--save", action="store_true", help="keep the rows under benchmarks/results/")
    arguments = parser.parse_args()
    if not importlib.util.find_spec("deepspeed"):
        print("DeepSpeed is not installed: its rows are left out", file=sys.stderr)
    bandwidths = copy_bandwidths(arguments.threads)
    cells = list(itertools.product(arguments.threads, arguments.cases, COMPARISONS))
    rows = (
        measure(comparison, case, threads, arguments.seconds, bandwidths[threads])
        for threads, case, comparison in progress(cells)
    )
    report(rows, arguments.save)


if __name__ == "__main__":
    main()
