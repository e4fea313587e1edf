# SPDX-License-Identifier: Apache-2.0
"""The step on a GPU, by size and number of tensors: with clip and EMA, every rule, every precision; JSON rows.

Each row compares with torch's own best, in turns. `share_of_copy` is relative to the copy bandwidth of the same run;
`host_us` is what one call costs the host. Sizes exceed the last-level cache but where it is about many small tensors.

Usage: python benchmarks/bench_gpu.py [--parts step states rules peers] [--output FOLDER] [--minutes 3] [--dry-run]
"""

import time
from collections.abc import Callable

import torch
from gpu_harness import Bench, Call, free, median_of, ratio_of
from torch import nn

from lightning_optkit import optimizers as ours
from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm

Build = Callable[[list[nn.Parameter]], Call]
CASES = {
    "124 M in 148": (124_000_000, 148),
    "4 M in 10": (4_000_000, 10),
    "4 M in 1000": (4_000_000, 1_000),
    "25 M in 160": (25_000_000, 160),
    "1 G in 300": (1_000_000_000, 300),
    "124 M in 10000": (124_000_000, 10_000),
}
RULES = {
    "SGD(momentum)": (ours.SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
    "Adagrad": (ours.Adagrad, torch.optim.Adagrad, {}),
    "RMSprop": (ours.RMSprop, torch.optim.RMSprop, {}),
    "Adadelta": (ours.Adadelta, torch.optim.Adadelta, {}),
    "Adam": (ours.Adam, torch.optim.Adam, {}),
    "AdamW(amsgrad)": (ours.AdamW, torch.optim.AdamW, dict(amsgrad=True)),
    "Adamax": (ours.Adamax, torch.optim.Adamax, {}),
    "NAdam": (ours.NAdam, torch.optim.NAdam, {}),
    "RAdam": (ours.RAdam, torch.optim.RAdam, {}),
    "Lion": (ours.Lion, None, {}),
    "LAMB": (ours.LAMB, None, {}),
    "LARS": (ours.LARS, None, {}),
    "Adan": (ours.Adan, None, {}),
    "ADOPT": (ours.ADOPT, None, {}),
    "AdEMAMix": (ours.AdEMAMix, None, {}),
    "AdaBelief": (ours.AdaBelief, None, {}),
    "MARS": (ours.MARS, None, {}),
    "Signum": (ours.Signum, None, {}),
    "SophiaG": (ours.SophiaG, None, {}),
    "StableAdamW": (ours.StableAdamW, None, {}),
    "ScheduleFreeAdamW": (ours.ScheduleFreeAdamW, None, {}),
}
STATES = {
    "fp32, bf16 state": (torch.float32, dict(state_dtype=torch.bfloat16)),
    "fp32, 8-bit state": (torch.float32, dict(state_dtype="int8")),
    "bf16, stochastic": (torch.bfloat16, dict(rounding="stochastic")),
    "bf16, Kahan": (torch.bfloat16, dict(rounding="kahan")),
    "bf16, stochastic, bf16 state": (torch.bfloat16, dict(rounding="stochastic", state_dtype=torch.bfloat16)),
    "fp32, statistics": (torch.float32, dict(statistics=True)),
}


def parameters(bench: Bench, total: int, count: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Fresh parameters with gradients."""
    if bench.dry:
        total, count = 40_000, min(count, 20)
    params = [nn.Parameter(torch.randn(total // count, device=bench.device).to(dtype)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def tail(params: list[nn.Parameter]) -> Call:
    """Clip, AdamW and EMA in one pass."""
    return ours.AdamW(params, clip=ClipNorm(1e-3), average=EMA(0.999)).step


def torch_tail(params: list[nn.Parameter]) -> Call:
    """The best that torch offers."""
    optimizer = torch.optim.AdamW(params, fused=True)
    averages, detached = [p.detach().clone() for p in params], [p.detach() for p in params]

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1e-3, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(averages, detached, 1 - 0.999)

    return step


COMPARISONS: list[tuple[str, Build, str, Build, int]] = [
    ("AdamW + clip + EMA", tail, "torch fused + foreach clip + foreach EMA", torch_tail, 40),
    ("AdamW", lambda p: ours.AdamW(p).step, "torch fused", lambda p: torch.optim.AdamW(p, fused=True).step, 28),
]


def host_us(bench: Bench, call: Call) -> float:
    """Microseconds of the host for one call; the device has caught up before."""
    times = []
    for _ in range(5):
        if not bench.dry:
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - began))
    return round(sorted(times)[2], 1)


def fits(bench: Bench, num_bytes: float) -> bool:
    """Is there so much memory?"""
    return bench.dry or num_bytes < 0.85 * torch.cuda.get_device_properties(0).total_memory


def compared(bench: Bench, facts: dict[str, object], mine: Call, theirs: Call | None, num_bytes: float) -> None:
    """One row."""
    calls = [mine] if theirs is None else [mine, theirs]
    turns = bench.compare(calls)
    ms = median_of(turns, 0)
    row = {**facts, "median_ms": round(ms, 4), **bench.share(num_bytes, ms), "host_us": host_us(bench, mine)}
    if theirs is not None:
        row |= {"their_ms": round(median_of(turns, 1), 4), "ratio": ratio_of(turns, 1)}
        row |= {"their_host_us": host_us(bench, theirs)}
    bench.row(**row)


def bench_step(bench: Bench) -> None:
    """Sizes and numbers of tensors."""
    for case, (total, count) in CASES.items():
        for variant, build, baseline, their_build, num_bytes in COMPARISONS:
            if not bench.has_time() or not fits(bench, 2 * 20 * total):
                continue
            params = parameters(bench, total, count), parameters(bench, total, count)
            size = sum(p.numel() for p in params[0])
            facts = {"benchmark": "gpu step", "case": case, "variant": variant, "baseline": baseline}
            compared(bench, facts, build(params[0]), their_build(params[1]), num_bytes * size)
            del params
            free()


def bytes_of(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> float:
    """What one step has to move: parameters and state read and written, gradients read."""
    moved = 0
    for p in params:
        moved += 3 * p.numel() * p.element_size()
        for t in optimizer.state[p].values():
            moved += 2 * t.numel() * t.element_size() if torch.is_tensor(t) and t.dim() > 0 else 0
    return moved


def bench_states(bench: Bench) -> None:
    """Precisions and roundings of AdamW."""
    for variant, (dtype, stages) in STATES.items():
        if not bench.has_time():
            return
        params, theirs = parameters(bench, 124_000_000, 148, dtype), parameters(bench, 124_000_000, 148, dtype)
        optimizer = ours.AdamW(params, **stages)  # type: ignore[arg-type]
        optimizer.step()
        facts = {
            "benchmark": "gpu states",
            "case": "124 M in 148",
            "variant": variant,
            "baseline": "torch fused, as is",
        }
        their_step = torch.optim.AdamW(theirs, fused=True).step
        compared(bench, facts, optimizer.step, their_step, bytes_of(optimizer, params))
        del params, theirs, optimizer
        free()


def bench_rules(bench: Bench) -> None:
    """Every rule, against torch's where it has one: fused where that exists, else foreach."""
    for name, (ours_class, _torch_class, arguments) in RULES.items():
        if not bench.has_time():
            return
        params, their_params = parameters(bench, 25_000_000, 160), parameters(bench, 25_000_000, 160)
        optimizer, theirs, baseline = ours_class(params, **arguments), None, "none"
        if hasattr(optimizer, "train"):
            optimizer.train()
        optimizer.step()
        if _torch_class is not None:
            try:
                theirs, baseline = _torch_class(their_params, fused=True, **arguments), "torch fused"
            except (TypeError, RuntimeError):
                theirs, baseline = _torch_class(their_params, foreach=True, **arguments), "torch foreach"
        facts = {"benchmark": "gpu rules", "case": "25 M in 160", "variant": name, "baseline": baseline}
        compared(bench, facts, optimizer.step, theirs.step if theirs else None, bytes_of(optimizer, params))
        del params, their_params, optimizer, theirs
        free()


def peers(params: list[nn.Parameter]) -> dict[str, Callable[[], Call]]:
    """The other implementations installed here, by name; built when called."""

    def default() -> Call:
        return torch.optim.AdamW(params).step

    def compiled() -> Call:
        on_cuda = params[0].is_cuda  # torch takes a rate in a tensor with foreach only where a graph could be captured
        optimizer = torch.optim.AdamW(params, lr=torch.tensor(1e-3), foreach=on_cuda, capturable=on_cuda)
        return torch.compile(optimizer.step)  # type: ignore[no-any-return]

    def apex() -> Call:
        from apex.optimizers import FusedAdam

        return FusedAdam(params).step  # type: ignore[no-any-return]

    def transformer_engine() -> Call:
        from transformer_engine.pytorch.optimizers import FusedAdam

        return FusedAdam(params).step  # type: ignore[no-any-return]

    return {
        "torch default": default, "apex FusedAdam": apex, "transformer_engine FusedAdam": transformer_engine,
        "torch.compile": compiled,
    }  # fmt: skip


def bench_peers(bench: Bench) -> None:
    """AdamW against everything else that is installed."""
    case = "25 M in 160"
    for name in ("torch default", "apex FusedAdam", "transformer_engine FusedAdam", "torch.compile"):
        if not bench.has_time():
            return
        params, their_params = parameters(bench, *CASES[case]), parameters(bench, *CASES[case])
        facts = {"benchmark": "gpu peers", "case": case, "variant": "AdamW", "baseline": name}
        try:
            theirs = peers(their_params)[name]()
            theirs()
        except Exception as error:
            print(f"# {name}: {type(error).__name__}: {str(error)[:120]}", flush=True)
            continue
        compared(bench, facts, ours.AdamW(params).step, theirs, 28 * sum(p.numel() for p in params))
        del params, their_params, theirs
        free()


def main() -> None:
    parts = {"step": bench_step, "states": bench_states, "rules": bench_rules, "peers": bench_peers}
    bench = Bench("gpu-step", __doc__, list(parts))
    for name in bench.parts:
        parts[name](bench)


if __name__ == "__main__":
    main()
