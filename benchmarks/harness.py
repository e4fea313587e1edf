# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: interleaved timing, the machine's own copy bandwidth, JSON rows and a table.

Variants are called in turn, so a machine that slows down slows them all; figures are medians. A ratio is the median of
the ratios of neighboring calls.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import lightning_optkit
from lightning_optkit._native import extension

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One measurement: `variant` against `baseline` on one case."""

    benchmark: str
    case: str
    variant: str
    baseline: str
    threads: int
    median_ms: float
    iqr_ms: float
    ratio: float  # time of the baseline / time of the variant
    megabytes: float
    gb_per_s: float
    share_of_copy: float
    target: float | None


def copy_bandwidth(num_bytes: int = 256 << 20) -> float:
    """GB/s of `Tensor.copy_`, read and write counted, on memory far larger than the caches."""
    source, target = torch.ones(num_bytes // 4), torch.zeros(num_bytes // 4)
    times = [seconds(lambda: target.copy_(source)) for _ in range(9)]
    return 2 * num_bytes / statistics.median(times) / 1e9


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(variants: dict[str, Callable[[], object]], budget_s: float) -> dict[str, list[float]]:
    """Seconds per call of each variant, called in turn for about `budget_s` seconds.

    A turn is one call unmeasured and then three measured: a run has one optimizer, so each variant may find in the
    caches what it left there itself, and not what the other one left.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    end = time.perf_counter() + budget_s
    while time.perf_counter() < end or len(next(iter(times.values()))) < 6:
        for name, call in variants.items():
            call()
            times[name] += [seconds(call) for _ in range(3)]
    return times


def ratio(baseline: list[float], variant: list[float]) -> float:
    """How many times faster the variant is: the median over neighboring calls."""
    return statistics.median(b / v for b, v in zip(baseline, variant, strict=True))


def environment() -> dict[str, str]:
    """What a figure depends on besides the code."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": _processor(),
        "cpu_isa": extension.cpu_isa() if extension else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "lightning_optkit": lightning_optkit.__version__,
        "huge_pages": _huge_pages(),
        "cores": str(os.cpu_count()),
    }


def report(rows: list[Row], save: bool) -> None:
    """JSON rows to stdout, then a table to stderr; with `save`, behind the day's rows under benchmarks/results/ too."""
    facts = environment()
    lines = [json.dumps({**asdict(row), **facts}) for row in rows]
    print("\n".join(lines))
    Console(file=sys.stderr, width=160).print(_table(rows))
    if save:
        path = RESULTS / f"{facts['date']}-{rows[0].benchmark}-{facts['machine'].replace(' ', '-').lower()}.jsonl"
        with path.open("a") as file:
            file.write("\n".join(lines) + "\n")
        print(f"added to {os.path.relpath(path)}", file=sys.stderr)


def _table(rows: list[Row]) -> Table:
    table = Table(title=rows[0].benchmark)
    for name in ("case", "threads", "variant", "ms", "GB/s", "of copy", "against", "ratio", "target"):
        table.add_column(name, justify="left" if name in ("case", "variant", "against") else "right")
    for row in rows:
        met = row.target is None or row.ratio >= row.target
        table.add_row(
            row.case,
            str(row.threads),
            row.variant,
            f"{row.median_ms:.3f}",
            f"{row.gb_per_s:.1f}",
            f"{row.share_of_copy:.0%}",
            row.baseline,
            f"{row.ratio:.2f}x",
            "-" if row.target is None else f">= {row.target:g}x {'met' if met else 'MISSED'}",
        )
    return table


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def _huge_pages() -> str:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.read_text().strip() if path.exists() else "unknown"
