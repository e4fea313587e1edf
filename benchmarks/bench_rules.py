# SPDX-License-Identifier: Apache-2.0
"""Every update rule against its torch counterpart at four sizes, the cost by number of tensors and elements, and bytes.

The two optimizers of a comparison are called alternately, on separate parameters. `--plot` draws the cost of AdamW over
the number of tensors and over the number of elements; `--memory` prints the bytes of state per parameter for each
`state_dtype`.

Usage: python benchmarks/bench_rules.py [--seconds 1] [--threads 1 2] [--save] [--plot docs/figures/step_cost.svg]
       python benchmarks/bench_rules.py --memory
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Row, copy_bandwidths, interleaved, progress, ratio, report
from torch import nn

from lightning_optkit import optimizers as ours

Step = Callable[[], object]

CASES = {
    "10 x (32, 32)": [(32, 32)] * 10,
    "150 x (64, 64)": [(64, 64)] * 150,
    "20 x (512, 512)": [(512, 512)] * 20,
    "32 x (1024, 1024)": [(1024, 1024)] * 32,
}
# Rule, arguments, and the flags of torch's class for the comparison.
RULES: list[tuple[str, dict[str, Any], tuple[dict[str, bool], ...]]] = [
    ("SGD", dict(lr=1e-3), ({}, dict(fused=True))),
    ("SGD", dict(lr=1e-3, momentum=0.9), ({}, dict(fused=True))),
    ("Adam", dict(), ({}, dict(fused=True))),
    ("AdamW", dict(), ({}, dict(fused=True))),
    ("AdamW", dict(amsgrad=True), ({}, dict(fused=True))),
    ("Adagrad", dict(), ({}, dict(fused=True))),
    ("RMSprop", dict(), ({}, dict(foreach=True))),
    ("Adadelta", dict(), ({}, dict(foreach=True))),
    ("Adamax", dict(), ({}, dict(foreach=True))),
    ("NAdam", dict(), ({}, dict(foreach=True))),
    ("RAdam", dict(), ({}, dict(foreach=True))),
    ("Adafactor", dict(), ({}, dict(foreach=True))),
    ("Muon", dict(), ({},)),
]
MEMORY: list[tuple[str, dict[str, Any]]] = [
    ("SGD", dict(lr=1e-3)),
    ("SGD", dict(lr=1e-3, momentum=0.9)),
    ("Adagrad", {}),
    ("RMSprop", {}),
    ("RMSprop", dict(momentum=0.9, centered=True)),
    ("Adadelta", {}),
    ("Adafactor", {}),
    ("Adam", {}),
    ("AdamW", {}),
    ("AdamW", dict(amsgrad=True)),
    ("Adamax", {}),
    ("NAdam", {}),
    ("RAdam", {}),
    ("Lion", {}),
    ("LAMB", {}),
    ("LARS", {}),
    ("Adan", {}),
    ("ADOPT", {}),
    ("AdEMAMix", {}),
    ("AdaBelief", {}),
    ("CAME", {}),
    ("SOAP", {}),
    ("DAdaptAdam", {}),
    ("MARS", {}),
    ("Signum", {}),
    ("SophiaG", {}),
    ("StableAdamW", {}),
    ("Prodigy", {}),
    ("Prodigy", dict(slice_p=11)),
    ("ScheduleFreeSGD", {}),
    ("ScheduleFreeAdamW", {}),
    ("Muon", {}),
]
STATE_DTYPES = (torch.float32, torch.bfloat16, "int8")
TENSORS, ELEMENTS = (10, 100, 1_000, 10_000), (10**4, 10**5, 10**6, 10**7, 10**8)


def parameters(shapes: list[tuple[int, ...]]) -> nn.ParameterList:
    """Fresh parameters with gradients."""
    params = nn.ParameterList(torch.randn(shape) for shape in shapes)
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def named(name: str, arguments: dict[str, Any]) -> str:
    """E.g. `SGD(momentum=0.9)`."""
    return f"{name}({', '.join(f'{key}={value}' for key, value in arguments.items() if key != 'lr')})"


def measure(
    case: str,
    shapes: list[tuple[int, ...]],
    rule: tuple[str, dict[str, Any], dict[str, bool]],
    threads: int,
    seconds: float,
    bandwidth: float,
) -> Row:
    """One row."""
    torch.set_num_threads(threads)
    name, arguments, flags = rule
    mine = getattr(ours, name)(parameters(shapes), **arguments)
    torchs = getattr(torch.optim, name)(parameters(shapes), **arguments, **flags)
    times = interleaved({"ours": mine.step, "theirs": torchs.step}, seconds)
    low, median, high = statistics.quantiles(times["ours"], n=4)
    moved = sum(plan.bytes_moved for plan in mine.explain().groups)
    return Row(
        benchmark="rules",
        case=case,
        variant=named(name, arguments),
        baseline=f"torch {named(name, {**arguments, **flags})}",
        threads=torch.get_num_threads(),
        median_ms=round(1e3 * median, 4),
        iqr_ms=round(1e3 * (high - low), 4),
        ratio=round(ratio(times["theirs"], times["ours"]), 3),
        megabytes=round(moved / 1e6, 3),
        gb_per_s=round(moved / median / 1e9, 2),
        share_of_copy=round(moved / median / 1e9 / bandwidth, 3),
        target=1.0,
    )


def sweep(seconds: float, threads: int, bandwidth: float) -> list[Row]:
    """AdamW by number of tensors of 1,000 elements, and by number of elements in 10 tensors."""
    cases = {f"{count} tensors of 1000": [(1000,)] * count for count in TENSORS}
    cases |= {f"{total} elements in 10": [(total // 10,)] * 10 for total in ELEMENTS}
    rule = ("AdamW", {}, dict(fused=True))
    return [measure(case, shapes, rule, threads, seconds, bandwidth) for case, shapes in cases.items()]


def plot(rows: list[Row], path: Path) -> None:
    """Two panels: time by number of tensors, and by number of elements."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for panel, word, label in zip(
        panels, ("tensors", "elements"), ("tensors of 1,000 elements", "elements in 10 tensors"), strict=True
    ):
        chosen = [row for row in rows if f" {word} " in row.case]
        counts = [int(row.case.split()[0]) for row in chosen]
        panel.loglog(
            counts, [row.median_ms * row.ratio for row in chosen], "o--", color="#b5651d", label="torch, fused"
        )
        panel.loglog(counts, [row.median_ms for row in chosen], "o-", color="#1f5fa8", label="lightning_optkit")
        panel.set_xlabel(label)
        panel.set_ylabel("ms per AdamW step")
        panel.grid(True, which="major", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    print(f"drawn to {path}", file=sys.stderr)


def memory() -> None:
    """Bytes of state per parameter, measured on the state of a matrix of a million parameters, as a Markdown table."""
    print("| rule | fp32 | bf16 | int8 |\n|---|---|---|---|")
    for name, arguments in MEMORY:
        cells = [_bytes_of_state(name, arguments, state_dtype) for state_dtype in STATE_DTYPES]
        print(f"| {named(name, arguments)} | {' | '.join(cells)} |")


def _bytes_of_state(name: str, arguments: dict[str, Any], state_dtype: torch.dtype | str) -> str:
    params = parameters([(1000, 1000)])
    try:
        optimizer = getattr(ours, name)(params, state_dtype=state_dtype, **arguments)
    except ValueError:
        return "refused"
    if name.startswith("ScheduleFree"):
        optimizer.train()
    optimizer.step()
    held = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
    return f"{held / 1e6:.3f}"


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="time per comparison")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--save", action="store_true", help="keep the rows under benchmarks/results/")
    parser.add_argument("--plot", type=Path, help="draw the cost of AdamW by tensors and elements, and nothing else")
    parser.add_argument("--memory", action="store_true", help="print the bytes of state, and nothing else")
    arguments = parser.parse_args()
    if arguments.memory:
        memory()
        return
    if arguments.plot:
        plot(sweep(arguments.seconds, 1, copy_bandwidths([1])[1]), arguments.plot)
        return
    pairs = [
        (threads, case, (name, kwargs, flags))
        for threads in arguments.threads
        for case in arguments.cases
        for name, kwargs, all_flags in RULES
        for flags in all_flags
    ]
    bandwidths = copy_bandwidths(arguments.threads)
    rows = (
        measure(case, CASES[case], rule, threads, arguments.seconds, bandwidths[threads])
        for threads, case, rule in progress(pairs)
    )
    report(rows, arguments.save)


if __name__ == "__main__":
    main()
