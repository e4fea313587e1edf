# SPDX-License-Identifier: Apache-2.0
"""What a step costs by the precision of weights and state: against our own in fp32, and against torch's fused steps.

All variants of a case are called in turn, on parameters of their own. Bytes are those that the step must move; the
share of copy is their rate over that of `Tensor.copy_` on as many threads.

With `--peers`, also the AdamW of torchao, bitsandbytes and DeepSpeed, where installed, and torch's through
`torch.compile`; they compile at their first step, which takes minutes.

With `--in-cache`, only the arithmetic: nanoseconds per 16 elements, from steps over 32768 elements and over 128.

Usage: python benchmarks/bench_precisions.py [--seconds 4] [--threads 1 2] [--rules AdamW] [--cases "2 x (4096, 4096)"]
           [--stages alone] [--precisions "bf16 weights, int8 state, split24"] [--peers] [--save] [--markdown]
           [--in-cache]
"""

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row, copy_bandwidths, interleaved, progress, ratio, report
from torch import nn

from lightning_optkit import optimizers as ours
from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.step import OnePassOptimizer

Shapes = list[tuple[int, ...]]

CASES: dict[str, Shapes] = {
    "150 x (64, 64)": [(64, 64)] * 150,
    "20 x (512, 512)": [(512, 512)] * 20,
    "32 x (1024, 1024)": [(1024, 1024)] * 32,
    "2 x (4096, 4096)": [(4096, 4096)] * 2,
}
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {}),
    "SGD(momentum=0.9)": ("SGD", dict(lr=1e-3, momentum=0.9)),
    "Lion": ("Lion", {}),
}
STATES: dict[str, torch.dtype | str] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": "int8"}
ROUNDINGS = ("nearest", "stochastic", "kahan", "split24", "split32")
# Weights, state, rounding of the weights.
PRECISIONS = [
    ("fp32", "fp32", "nearest"),
    ("fp32", "bf16", "nearest"),
    ("fp32", "int8", "nearest"),
    *(("bf16", state, rounding) for state in STATES for rounding in ROUNDINGS),
]
STAGES: dict[str, dict[str, Any]] = {"alone": {}, "clip + EMA": dict(clip=ClipNorm(1e6), average=EMA(0.999))}


def label_of(weights: str, state: str, rounding: str) -> str:
    """The name of a precision."""
    return f"{weights} weights, {state} state, {rounding}"


def parameters(shapes: Shapes, dtype: torch.dtype) -> nn.ParameterList:
    """Fresh parameters with gradients."""
    params = nn.ParameterList(nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes)
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def dtype_of(weights: str) -> torch.dtype:
    """Of the parameters."""
    return torch.bfloat16 if weights == "bf16" else torch.float32


def optimizers(shapes: Shapes, rule: str, stages: str, precisions: list[str]) -> Iterator[tuple[str, OnePassOptimizer]]:
    """Label and optimizer of each of these precisions, on parameters of its own."""
    name, arguments = RULES[rule]
    for weights, state, rounding in PRECISIONS:
        if (label := label_of(weights, state, rounding)) in precisions:
            params, chosen = parameters(shapes, dtype_of(weights)), dict(state_dtype=STATES[state], rounding=rounding)
            yield label, getattr(ours, name)(params, **chosen, **arguments, **STAGES[stages])


def peers(shapes: Shapes) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and step of each AdamW of another package, on parameters of its own; the name ends with their dtype."""
    if importlib.util.find_spec("torchao"):
        from torchao.optim import AdamW8bit

        yield "torchao AdamW8bit, fp32", AdamW8bit(list(parameters(shapes, torch.float32))).step
        yield "torchao AdamW8bit, bf16", AdamW8bit(list(parameters(shapes, torch.bfloat16))).step
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes

        yield "bitsandbytes AdamW8bit, fp32", bitsandbytes.optim.AdamW8bit(parameters(shapes, torch.float32)).step
    if importlib.util.find_spec("deepspeed"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            yield f"DeepSpeedCPUAdam, {name}", DeepSpeedCPUAdam(list(parameters(shapes, dtype)), adamw_mode=True).step
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        optimizer = torch.optim.AdamW(parameters(shapes, dtype), lr=torch.tensor(1e-3), capturable=False, foreach=False)
        yield f"torch.compile, {name}", torch.compile(optimizer.step)


def measure(
    case: str, rule: str, stages: str, threads: int, bandwidth: float, given: argparse.Namespace
) -> Iterator[Row]:
    """Rows for each precision, with the bytes per element in the variant's name."""
    torch.set_num_threads(threads)
    name, arguments = RULES[rule]
    shapes = CASES[case]
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    steps: dict[str, Callable[[], object]] = {}
    moved: dict[str, int] = {}
    for label, optimizer in optimizers(shapes, rule, stages, given.precisions):
        steps[label], moved[label] = optimizer.step, sum(plan.bytes_moved for plan in optimizer.explain().groups)
    if stages == "alone" and hasattr(torch.optim, name):
        for weights in ("fp32", "bf16"):
            optimizer = getattr(torch.optim, name)(parameters(shapes, dtype_of(weights)), **arguments, fused=True)
            steps[f"torch fused, {weights}"] = optimizer.step
    if given.peers and stages == "alone" and rule == "AdamW":
        steps |= dict(peers(shapes))
    times = interleaved(steps, given.seconds)
    first = next(iter(steps))
    for label in moved:
        low, median, high = statistics.quantiles(times[label], n=4)
        against = [first] + [peer for peer in times if peer not in moved and peer[-4:] == label[:4]]
        for peer in against:
            yield Row(
                benchmark="precisions",
                case=case,
                variant=f"{rule}, {stages}: {label} ({moved[label] / elements:.1f} bytes)",
                baseline=f"{rule}, {stages}: {peer}",
                threads=torch.get_num_threads(),
                median_ms=round(1e3 * median, 4),
                iqr_ms=round(1e3 * (high - low), 4),
                ratio=round(ratio(times[peer], times[label]), 3),
                megabytes=round(moved[label] / 1e6, 3),
                gb_per_s=round(moved[label] / median / 1e9, 2),
                share_of_copy=round(moved[label] / median / 1e9 / bandwidth, 3),
                target=None,
            )


def measure_in_cache(rule: str, stages: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What elements cost by themselves, on one thread, without memory and without what a step costs at all."""
    torch.set_num_threads(1)
    most, least = 2**15, 2**7
    many, few = (dict(optimizers([(num,)], rule, stages, given.precisions)) for num in (most, least))
    for label in many:
        times = interleaved({"many": many[label].step, "few": few[label].step}, given.seconds / len(many))
        seconds = statistics.median(times["many"]) - statistics.median(times["few"])
        yield {"benchmark": "precisions in cache", "variant": f"{rule}, {stages}: {label}"} | {
            "ns_per_16_elements": round(16e9 * seconds / (most - least), 2)
        }


def markdown(rows: list[Row]) -> None:
    """Times over those of our own in fp32: a table for each rule and set of stages, a column for a case and threads."""
    columns = list(dict.fromkeys((row.case, row.threads) for row in rows))
    for heading in dict.fromkeys(row.variant.split(":")[0] for row in rows):
        print(f"\n{heading}\n\n| | {' | '.join(f'{case}, {threads}' for case, threads in columns)} |")
        print("|---" * (len(columns) + 1) + "|")
        own = [
            row
            for row in rows
            if row.variant.startswith(f"{heading}:") and row.baseline.endswith(label_of(*PRECISIONS[0]))
        ]
        for label in dict.fromkeys(row.variant.split(": ")[1] for row in own):
            cells = {(r.case, r.threads): f"{1 / r.ratio:.2f}" for r in own if r.variant.endswith(f": {label}")}
            print(f"| {label} | {' | '.join(cells.get(column, '') for column in columns)} |")


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="time per case, rule and set of stages")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    precisions = [label_of(*one) for one in PRECISIONS]
    parser.add_argument("--precisions", nargs="+", default=precisions, choices=precisions, metavar="PRECISION")
    parser.add_argument("--peers", action="store_true", help="also the AdamW of other packages")
    parser.add_argument("--save", action="store_true", help="keep the rows under benchmarks/results/")
    parser.add_argument("--markdown", action="store_true", help="print the tables of docs/performance.md at the end")
    parser.add_argument("--in-cache", action="store_true", help="only what elements cost where all is in the caches")
    arguments = parser.parse_args()
    if arguments.in_cache:
        for rule in arguments.rules:
            for stages in arguments.stages:
                for row in measure_in_cache(rule, stages, arguments):
                    print(json.dumps(row), flush=True)
        return
    bandwidths = copy_bandwidths(arguments.threads)
    runs = [
        (case, rule, stages, threads)
        for rule in arguments.rules
        for stages in arguments.stages
        for case in arguments.cases
        for threads in arguments.threads
    ]
    rows = report(
        (row for run in progress(runs) for row in measure(*run, bandwidths[run[3]], arguments)),
        arguments.save,
    )
    if arguments.markdown:
        markdown(rows)
    print(f"{len(rows)} rows", file=sys.stderr)


if __name__ == "__main__":
    main()
