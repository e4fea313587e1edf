# SPDX-License-Identifier: Apache-2.0
"""Shared by every benchmark: interleaved timing, the machine's copy bandwidth, JSON rows and a table.

Variants are called alternately, so a slow phase of the machine affects all of them; figures are medians. A ratio is the
median of the ratios of neighboring calls.
"""

import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import lightning_optkit
from lightning_optkit._native import extension

Case = TypeVar("Case")
LONG = 0.05  # seconds
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


def copy_bandwidths(threads: Sequence[int]) -> dict[int, float]:
    """The same, by number of threads."""
    found = {}
    for count in threads:
        torch.set_num_threads(count)
        found[count] = copy_bandwidth()
    return found


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(variants: dict[str, Callable[[], object]], budget_s: float) -> dict[str, list[float]]:
    """Seconds per call of each variant, called in turn for about `budget_s` seconds.

    A turn is one unmeasured call and then three measured ones: a run has one optimizer, so each variant may find its
    own data in the caches, not that of the other one. A call of more than LONG seconds finds nothing useful there, and
    is measured every time.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    is_long = max(seconds(call) for call in variants.values()) > LONG
    per_turn, at_least = (1, 3) if is_long else (3, 6)
    end = time.perf_counter() + budget_s
    while time.perf_counter() < end or len(next(iter(times.values()))) < at_least:
        for name, call in variants.items():
            if not is_long:
                call()
            times[name] += [seconds(call) for _ in range(per_turn)]
    return times


def ratio(baseline: list[float], variant: list[float]) -> float:
    """How many times faster the variant is: the median over neighboring calls."""
    return statistics.median(b / v for b, v in zip(baseline, variant, strict=True))


def environment() -> dict[str, str]:
    """The facts besides the code that a result depends on."""
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


def report(rows: Iterable[Row], save: bool) -> list[Row]:
    """Prints each row as JSON to stdout as it is measured, and a table to stderr at the end.

    With `save` they go behind the day's rows under benchmarks/results/ too.
    """
    facts, measured, path = environment(), [], None
    for row in rows:
        measured.append(row)
        line = json.dumps({**asdict(row), **facts})
        print(line, flush=True)
        if save:
            path = results_file(row.benchmark, facts)
            with path.open("a") as file:
                file.write(line + "\n")
    if measured:
        Console(file=sys.stderr, width=160).print(_table(measured))
    if path is not None:
        print(f"added to {os.path.relpath(path)}", file=sys.stderr)
    return measured


def results_file(benchmark: str, facts: dict[str, str]) -> Path:
    """The day's file of a benchmark on this machine."""
    machine = "-".join(re.findall(r"[a-z0-9.]+", facts["machine"].lower().replace("(r)", "").replace("(tm)", "")))
    return RESULTS / f"{facts['date']}-{benchmark}-{machine}.jsonl"


def progress(cases: Sequence[Case]) -> Iterable[Case]:
    """The cases, with a bar on stderr."""
    return track(cases, description="measuring", console=Console(file=sys.stderr), transient=True)


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
