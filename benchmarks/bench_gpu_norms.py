# SPDX-License-Identifier: Apache-2.0
"""LayerNorm, RMSNorm and addition + LayerNorm on a GPU, forward and backward, by rows and columns; JSON rows.

The kernels alone: each call is captured in a graph, over so many sets of inputs that the last-level cache holds none.
Usage: python benchmarks/bench_gpu_norms.py [--parts kernels compiled] [--output FOLDER] [--minutes 2] [--dry-run]
"""

import itertools
from collections.abc import Callable

import torch
from gpu_harness import Bench, Call, free, median_of, ratio_of
from torch import Tensor

import lightning_optkit.layers

SHAPES = [
    (16384, 1024), (16384, 4096), (4096, 768), (16384, 8192), (1_000_000, 64), (65536, 255), (128, 4096), (65536, 256),
    (4096, 16384), (16384, 1001), (8192, 2048), (8192, 5120), (131072, 128), (4096, 9001),
]  # fmt: skip
EPS = 1e-5


class Inputs:
    """One set of numbers for all calls."""

    def __init__(self, rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        def fresh(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype)

        self.size = size
        self.x, self.residual, self.dy, self.d_sum = (fresh(rows, size) for _ in range(4))
        self.weight, self.bias = fresh(size), fresh(size)
        self.stats = torch.ops.lightning_optkit._norm(True, self.x, self.weight, self.bias, 1, EPS)[1]
        self.rms_stats = torch.ops.lightning_optkit._norm(False, self.x, self.weight, None, 1, EPS)[1]
        self.their_stats = torch.ops.aten.native_layer_norm(self.x, [size], self.weight, self.bias, EPS)[1:]


def has_fused_rms() -> bool:
    """Does torch have RMSNorm in one kernel?"""
    return hasattr(torch.ops.aten, "_fused_rms_norm_backward")


def layer_forward(i: Inputs) -> object:
    return torch.ops.lightning_optkit._norm(True, i.x, i.weight, i.bias, 1, EPS)


def torch_layer_forward(i: Inputs) -> object:
    return torch.ops.aten.native_layer_norm(i.x, [i.size], i.weight, i.bias, EPS)


def layer_backward(i: Inputs) -> object:
    return torch.ops.lightning_optkit.norm_backward(
        True, i.dy, None, i.x, i.stats, i.weight, 1, 0.0, None, True, True, True
    )


def torch_layer_backward(i: Inputs) -> object:
    mean, rstd = i.their_stats
    mask = [True, True, True]
    return torch.ops.aten.native_layer_norm_backward(i.dy, i.x, [i.size], mean, rstd, i.weight, i.bias, mask)


def rms_forward(i: Inputs) -> object:
    return torch.ops.lightning_optkit._norm(False, i.x, i.weight, None, 1, EPS)


def torch_rms_forward(i: Inputs) -> object:
    return torch.nn.functional.rms_norm(i.x, (i.size,), i.weight, EPS)


def rms_backward(i: Inputs) -> object:
    return torch.ops.lightning_optkit.norm_backward(
        False, i.dy, None, i.x, i.rms_stats, i.weight, 1, 0.0, None, True, True, False
    )


def torch_rms_backward(i: Inputs) -> object:
    rstd = i.rms_stats.view(-1, 1)
    return torch.ops.aten._fused_rms_norm_backward(i.dy, i.x, [i.size], rstd, i.weight, [True, True])


def add_forward(i: Inputs) -> object:
    return torch.ops.lightning_optkit._add_norm(True, i.x, i.residual, i.weight, i.bias, 1, EPS, 0.0, None)


def torch_add_forward(i: Inputs) -> object:
    return torch.ops.aten.native_layer_norm(i.x + i.residual, [i.size], i.weight, i.bias, EPS)


def add_backward(i: Inputs) -> object:
    return torch.ops.lightning_optkit.norm_backward(
        True, i.dy, i.d_sum, i.x, i.stats, i.weight, 1, 0.0, None, True, True, True
    )


def torch_add_backward(i: Inputs) -> object:
    mean, rstd = i.their_stats
    mask = [True, True, True]
    dx, *_ = torch.ops.aten.native_layer_norm_backward(i.dy, i.x, [i.size], mean, rstd, i.weight, i.bias, mask)
    return dx + i.d_sum


KERNELS: dict[str, tuple[Callable[[Inputs], object], Callable[[Inputs], object], int]] = {
    # name: ours, torch's, arrays of the size of the input that must be moved
    "LayerNorm backward": (layer_backward, torch_layer_backward, 3),
    "add + LayerNorm backward": (add_backward, torch_add_backward, 4),
    "LayerNorm forward": (layer_forward, torch_layer_forward, 2),
    "add + LayerNorm forward": (add_forward, torch_add_forward, 4),
    "RMSNorm forward": (rms_forward, torch_rms_forward, 2),
    "RMSNorm backward": (rms_backward, torch_rms_backward, 3),
}


def sets_of_inputs(bench: Bench, rows: int, size: int, dtype: torch.dtype) -> list[Inputs]:
    """At least 256 MB of each array, so that no call finds its numbers in the cache."""
    if bench.dry:
        rows, size = min(rows, 8), min(size, 64)
    num_bytes = rows * size * dtype.itemsize
    count = 1 if bench.dry else max(1, min(64, (256 << 20) // num_bytes))
    return [Inputs(rows, size, dtype, bench.device) for _ in range(count)]


def over(inputs: list[Inputs], kernel: Callable[[Inputs], object]) -> Call:
    """One call for every set."""

    def call() -> None:
        for one in inputs:
            kernel(one)

    return call


def bench_kernels(bench: Bench) -> None:
    """Every kernel over every shape, bf16 first."""
    for dtype, (rows, size) in itertools.product((torch.bfloat16, torch.float32), SHAPES):
        if not bench.has_time():
            return
        inputs = sets_of_inputs(bench, rows, size, dtype)
        for name, (mine, theirs, arrays) in KERNELS.items():
            if theirs is torch_rms_backward and not has_fused_rms():
                continue
            if theirs is torch_rms_backward and bench.dry:
                continue  # for CUDA only
            calls = [bench.graph(over(inputs, kernel)) for kernel in (mine, theirs)]
            turns = bench.compare(calls, turns=5, milliseconds=6.0)
            ms = median_of(turns, 0) / len(inputs)
            num_bytes = arrays * inputs[0].x.numel() * dtype.itemsize
            bench.row(
                benchmark="gpu norms", case=f"{rows} x {size}", dtype=str(dtype).removeprefix("torch."), variant=name,
                baseline="torch", median_ms=round(ms, 5), their_ms=round(median_of(turns, 1) / len(inputs), 5),
                ratio=ratio_of(turns, 1), **bench.share(num_bytes, ms),
            )  # fmt: skip
            del calls
        del inputs
        free()


def both_ways(module: torch.nn.Module, x: Tensor, dy: Tensor) -> Call:
    """One call forward and backward."""
    return lambda: torch.autograd.grad(module(x), [x, *module.parameters()], dy)


def bench_compiled(bench: Bench) -> None:
    """Forward and backward of a module, torch.compile on torch's layer as the baseline, Liger's where it is there."""
    for (rows, size), dtype in itertools.product([(16384, 1024), (16384, 4096)], [torch.bfloat16]):
        if not bench.has_time():
            return
        rows, size = (8, 64) if bench.dry else (rows, size)
        x = torch.randn(rows, size, device=bench.device, dtype=dtype, requires_grad=True)
        dy = torch.randn_like(x)
        mine = lightning_optkit.layers.LayerNorm(size, device=bench.device, dtype=dtype)
        others = {"torch": torch.nn.LayerNorm(size, device=bench.device, dtype=dtype)}
        if not bench.dry:
            others["torch.compile"] = torch.compile(torch.nn.LayerNorm(size, device=bench.device, dtype=dtype))
        try:
            from liger_kernel.transformers import LigerLayerNorm

            others["liger"] = LigerLayerNorm(size).to(bench.device, dtype)
        except ImportError:
            pass
        calls = [both_ways(mine, x, dy)]
        for name, module in list(others.items()):
            call = both_ways(module, x, dy)
            try:
                call()
            except Exception as error:  # a compiler that is not installed
                print(f"# {name}: {type(error).__name__}: {str(error)[:120]}", flush=True)
                del others[name]
            else:
                calls.append(call)
        turns = bench.compare(calls, turns=5)
        ms = median_of(turns, 0)
        for k, name in enumerate(others, start=1):
            bench.row(
                benchmark="gpu norm modules", case=f"{rows} x {size}", dtype=str(dtype).removeprefix("torch."),
                variant="LayerNorm forward + backward, with the host", baseline=name, median_ms=round(ms, 4),
                their_ms=round(median_of(turns, k), 4), ratio=ratio_of(turns, k),
                **bench.share(5 * x.numel() * x.element_size(), ms),
            )  # fmt: skip


def main() -> None:
    parts = {"kernels": bench_kernels, "compiled": bench_compiled}
    bench = Bench("gpu-norms", __doc__, list(parts))
    for name in bench.parts:
        parts[name](bench)


if __name__ == "__main__":
    main()
