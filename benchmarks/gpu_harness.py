# SPDX-License-Identifier: Apache-2.0
"""Shared by the GPU benchmarks: times on the device, the copy bandwidth, JSON rows written as they are measured.

A dry run does the same at tiny sizes on the CPU, so that nothing but the kernels is new on the day of a GPU.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Call = Callable[[], object]
PEERS = ("apex", "transformer_engine", "liger_kernel", "bitsandbytes")


class Bench:
    """Options, facts and rows of one run.

    Args:
        name: Name of the benchmark, and of its file of rows.
        doc: The text of `--help`.
        parts: The available parts; by default all run, in this order.
    """

    def __init__(self, name: str, doc: str | None, parts: Sequence[str]) -> None:
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
        parser.add_argument("--parts", nargs="*", choices=parts, default=list(parts))
        parser.add_argument("--minutes", type=float, default=10.0, help="begin nothing new after so many minutes")
        parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
        arguments = parser.parse_args()
        self.parts, self.dry = arguments.parts, arguments.dry_run
        if not self.dry and not torch.cuda.is_available():
            parser.error("there is no CUDA device; --dry-run tests the rest")
        self.device = torch.device("cpu" if self.dry else "cuda")
        self._end = time.monotonic() + 60 * arguments.minutes
        self.copy_gb_per_s = self._copy_bandwidth()
        machine = "dry run" if self.dry else torch.cuda.get_device_name()
        self.facts = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "driver": driver(),
            "copy_gb_per_s": round(self.copy_gb_per_s, 1),
        }
        arguments.output.mkdir(parents=True, exist_ok=True)
        self._file = arguments.output / f"{self.facts['date']}-{name}-{machine.replace(' ', '-').lower()}.jsonl"
        absent = [peer for peer in PEERS if importlib.util.find_spec(peer) is None]
        print(
            f"# {machine}, copy {self.copy_gb_per_s:.0f} GB/s; not installed: {', '.join(absent) or 'none'}", flush=True
        )

    def has_time(self) -> bool:
        """Whether there is time to start another measurement."""
        return time.monotonic() < self._end

    def row(self, **row: object) -> None:
        """Prints and keeps a row."""
        line = json.dumps({**row, **self.facts})
        print(line, flush=True)
        with self._file.open("a") as file:
            file.write(line + "\n")

    def share(self, num_bytes: float, milliseconds: float) -> dict[str, float]:
        """GB/s, and the fraction of the copy bandwidth."""
        rate = num_bytes / milliseconds / 1e6
        return {"gb_per_s": round(rate, 1), "share_of_copy": round(rate / self.copy_gb_per_s, 3)}

    def compare(self, calls: Sequence[Call], turns: int = 7, milliseconds: float = 15.0) -> list[list[float]]:
        """Times of one call each, in milliseconds: a row per turn, in which the calls come one after another.

        There are many calls between two events: if the host is slower than the device, this is the host's time.
        """
        repeats = []
        for call in calls:
            call()
            call()
            once = self.time(call, 2)
            repeats.append(1 if self.dry else max(1, min(500, int(milliseconds / once))))
        return [[self.time(call, n) for call, n in zip(calls, repeats, strict=True)] for _ in range(turns)]

    def time(self, call: Call, repeats: int) -> float:
        """Milliseconds of one of `repeats` calls."""
        if self.dry:
            began = time.perf_counter()
            for _ in range(repeats):
                call()
            return max(1000 * (time.perf_counter() - began) / repeats, 1e-6)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats

    def graph(self, call: Call) -> Call:
        """The same calls without the host's part: replays a graph of them, if they can be captured."""
        if self.dry:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def _copy_bandwidth(self) -> float:
        source = torch.ones(1 << (16 if self.dry else 28), device=self.device)
        target = torch.empty_like(source)
        times = [self.time(lambda: target.copy_(source), 1) for _ in range(15)]
        return 2 * source.numel() * 4 / statistics.median(times) / 1e6


def median_of(turns: Sequence[Sequence[float]], column: int) -> float:
    """Median time of one of the calls compared."""
    return statistics.median(turn[column] for turn in turns)


def ratio_of(turns: Sequence[Sequence[float]], column: int) -> float:
    """How many times slower than the first a call is: the median over turns."""
    return round(statistics.median(turn[column] / turn[0] for turn in turns), 3)


def free() -> None:
    """Frees unused memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def driver() -> str:
    """Version of the kernel driver."""
    path = "/proc/driver/nvidia/version"
    if not os.path.exists(path):
        return "none"
    words = Path(path).read_text().split()
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")
