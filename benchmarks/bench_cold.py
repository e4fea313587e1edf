# SPDX-License-Identifier: Apache-2.0
"""A step between other work, as in training: forward and backward have taken the caches before it.

Before each measured call, a pass over `--other` MB of another array. The same variants right after a call of their own
are the warm rows. GB/s are of the bytes that the step must move. With `--parts`, instead the microseconds of a cold
step of AdamW and of its parts: reading the gradients, that with a look at the other records, the walk. The rest is
Python.

Usage: python benchmarks/bench_cold.py [--seconds 2] [--threads 1 2] [--other 256] [--save]
       [--parts]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from harness import Row, copy_bandwidths, progress, ratio, report, seconds
from torch import nn

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import SGD, AdamW
from lightning_optkit.step import compiled
from lightning_optkit.step.compiled import CompiledSegment
from lightning_optkit.step.engine import StepEngine

CASES = {
    "150 x (64, 64)": [(64, 64)] * 150,
    "600 x (64, 64)": [(64, 64)] * 600,
    "20 x (512, 512)": [(512, 512)] * 20,
    "2 x (4096, 4096)": [(4096, 4096)] * 2,
}
# Bytes per element: the parameter, its gradient and each state, read, and written but for the gradient.
BYTES = {"AdamW": 28, "AdamW, clip + EMA": 40, "SGD(momentum)": 20, "torch AdamW(fused=True)": 28}


def steps_of(shapes: list[tuple[int, ...]]) -> dict[str, Callable[[], object]]:
    """The step of each variant, on parameters of its own."""

    def parameters() -> nn.ParameterList:
        params = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)
        for p in params:
            p.grad = torch.randn_like(p) * 1e-3
        return params

    return {
        "AdamW": AdamW(parameters()).step,
        "AdamW, clip + EMA": AdamW(parameters(), clip=ClipNorm(1e6), average=EMA(0.999)).step,
        "SGD(momentum)": SGD(parameters(), lr=1e-3, momentum=0.9).step,
        "torch AdamW(fused=True)": torch.optim.AdamW(parameters(), fused=True).step,
    }


def measure(case: str, threads: int, other_mb: int, bandwidth: float, budget_s: float) -> Iterator[Row]:
    """Cold and warm rows of every variant."""
    torch.set_num_threads(threads)
    other, steps = torch.ones(other_mb << 18), steps_of(CASES[case])
    times: dict[str, list[float]] = {f"{name}, {state}": [] for name in steps for state in ("cold", "warm")}
    end = time.perf_counter() + budget_s
    while time.perf_counter() < end or len(times["AdamW, cold"]) < 6:
        for name, step in steps.items():
            other += 1.0
            times[f"{name}, cold"].append(seconds(step))
            times[f"{name}, warm"].append(seconds(step))
    elements = sum(torch.Size(shape).numel() for shape in CASES[case])
    for name in list(BYTES)[:-1]:
        for state in ("cold", "warm"):
            variant, baseline = f"{name}, {state}", f"torch AdamW(fused=True), {state}"
            low, median, high = statistics.quantiles(times[variant], n=4)
            moved = BYTES[name] * elements
            yield Row(
                benchmark="cold",
                case=case,
                variant=variant,
                baseline=baseline,
                threads=threads,
                median_ms=round(1e3 * median, 4),
                iqr_ms=round(1e3 * (high - low), 4),
                ratio=round(ratio(times[baseline], times[variant]), 3),
                megabytes=round(moved / 1e6, 3),
                gb_per_s=round(moved / median / 1e9, 2),
                share_of_copy=round(moved / median / 1e9 / bandwidth, 3),
                target=None,
            )


def parts(case: str, other_mb: int, turns: int = 40) -> dict[str, float]:
    """Medians over cold steps of AdamW, in microseconds. The look of the walk itself counts as walk."""
    times: dict[str, list[float]] = {}

    def timed(name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return part(*given, **named)
            finally:
                times.setdefault(name, []).append(time.perf_counter() - start)

        return call

    step, other = steps_of(CASES[case])["AdamW"], torch.ones(other_mb << 18)
    with (
        mock.patch.object(compiled, "_gradients", timed("gradients", compiled._gradients)),
        mock.patch.object(CompiledSegment, "step", timed("walk", CompiledSegment.step)),
        mock.patch.object(StepEngine, "_bind", timed("gradients and records", StepEngine._bind)),
    ):
        for _ in range(turns):
            other += 1.0
            times.setdefault("step", []).append(seconds(step))
    return {name: round(1e6 * statistics.median(found[turns // 8 :]), 1) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="time per case and number of threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--other", type=int, default=256, help="MB of another array that is read and written before")
    parser.add_argument("--save", action="store_true", help="keep the rows under benchmarks/results/")
    parser.add_argument("--parts", action="store_true", help="the parts of a cold step, in one thread")
    given = parser.parse_args()
    if given.parts:
        torch.set_num_threads(1)
        for case in given.cases:
            print(json.dumps({"case": case, "microseconds": parts(case, given.other)}))
        return
    bandwidths = copy_bandwidths(given.threads)
    cases = [(case, threads) for threads in given.threads for case in given.cases]
    report(
        (
            row
            for case, threads in progress(cases)
            for row in measure(case, threads, given.other, bandwidths[threads], given.seconds)
        ),
        given.save,
    )


if __name__ == "__main__":
    main()
