# SPDX-License-Identifier: Apache-2.0
"""`optkit bench`."""

import statistics
import time
from collections.abc import Callable
from itertools import cycle

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_optkit._checks import check_in, check_int, check_one_of
from lightning_optkit._native import extension, missing_reason
from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import AdamW

__all__ = ["bench"]

SIZES = {"150 x (64, 64)": (150, 64), "32 x (512, 512)": (32, 512), "6 x (2048, 2048)": (6, 2048)}
_WARM_UP = 3  # calls of each variant before the first that counts
_LEAST = 5


def bench(seconds: float = 2.0, device: str = "cpu", threads: int | None = None) -> None:
    """Times the one-pass step against torch on this machine: clip, AdamW, average; three sizes of network.

    Variants are called in turn, so that a change of the clock hits all alike; times are medians. It is the tail of a
    training step, after the backward pass; how much of a whole step that is depends on the network.

    Args:
        seconds: Time for each size, in (0, inf).
        device: "cpu" or "cuda".
        threads: Of the CPU, at least 1. Default: as many as torch takes.

    Raises:
        ValueError: for an argument out of range.
    """
    check_in("bench", "seconds", seconds, "(0, inf)")
    check_one_of("bench", "device", device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"bench(device={device!r}): device must be 'cpu', since torch sees no GPU.")
    if threads is not None:
        torch.set_num_threads(check_int("bench", "threads", threads, minimum=1))
    console = Console(highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("parameters", "one pass, ms", "torch fused", "torch", "times faster"):
        table.add_column(heading, overflow="fold")
    for title, (number, width) in SIZES.items():
        ours, fused, plain = (1e3 * time for time in _medians(_variants(number, width, device), seconds, device))
        faster = f"{fused / ours:.2f} and {plain / ours:.2f}"
        table.add_row(title, f"{ours:.3f}", f"{fused:.3f}", f"{plain:.3f}", faster)
    console.print(table)
    number_of_threads = torch.get_num_threads()
    where = f"{number_of_threads} thread{'s' * (number_of_threads > 1)}" if device == "cpu" else device
    console.print(f"Clip, AdamW, EMA of fp32 parameters; torch {torch.__version__}, {where}.")
    if extension is None:
        console.print(
            f"Without the compiled extension ({missing_reason}): plain PyTorch, slower than torch's own steps."
        )
    console.print(
        "torch: clip_grad_norm_, AdamW, AveragedModel. More in its sources: docs/performance.md, `make bench`."
    )


def _variants(number: int, width: int, device: str) -> list[Callable[[], None]]:
    """The same work three times, each on its own parameters."""
    made: list[Callable[[], None]] = []
    for kind in ("ours", "fused", "plain"):
        net = torch.nn.ParameterList([torch.randn(width, width, device=device) for _ in range(number)])
        for param in net:
            param.grad = torch.randn_like(param)
        if kind == "ours":
            made.append(AdamW(net.parameters(), clip=ClipNorm(1.0), average=EMA(0.999)).step)
        else:
            made.append(_of_torch(net, fused=kind == "fused"))
    return made


def _of_torch(net: torch.nn.Module, fused: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(net.parameters(), fused=fused or None)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999))  # type: ignore[no-untyped-call]

    def step() -> None:
        norm: Tensor = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        del norm
        optimizer.step()
        averaged.update_parameters(net)

    return step


def _medians(variants: list[Callable[[], None]], seconds: float, device: str) -> list[float]:
    samples: list[list[float]] = [[] for _ in variants]
    end = time.perf_counter() + seconds
    for call, place in enumerate(cycle(range(len(variants)))):
        started = time.perf_counter()
        variants[place]()
        if device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if call >= _WARM_UP * len(variants):
            samples[place].append(now - started)
        if now > end and len(samples[-1]) >= _LEAST:
            break
    return [statistics.median(each) for each in samples]
