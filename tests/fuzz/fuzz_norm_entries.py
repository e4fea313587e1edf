# SPDX-License-Identifier: Apache-2.0
"""Random valid and invalid calls of the norms' C++ entries: each must succeed correctly or raise a clear error.

python tests/fuzz/fuzz_norm_entries.py --calls 20000 --seconds 120 --seed 0
"""

import argparse
import json
import random
import re
import time

import torch
from torch import Tensor

from lightning_optkit._native import extension, node
from lightning_optkit.layers import _ops
from lightning_optkit.layers._reference import survival

OPS = ("norm", "_norm", "add_norm", "_add_norm", "norm_backward")
NODE = ("node.norm", "node.add_norm", "node.connect")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
OTHER_DTYPES = (*DTYPES, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
OUTCOMES = ("accepted", "refused", "passed_on", "accepted_wrong", "refused_otherwise", "right_refused", "meta_differs")
FAILURES = OUTCOMES[3:]


# --- right calls ---


def right_call(rng: random.Random) -> tuple[str, dict]:
    """An entry and its arguments in order."""
    name = rng.choice(OPS + (NODE if node is not None else ()))
    if name == "node.connect":
        return name, dict(library=extension.__file__, reference=_ops._reference_gradients)
    shape = [rng.choice((1, 2, 3, 5, 8, 17)) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.05:
        shape[0] = 0 if len(shape) > 1 else shape[0]
    dims = rng.randint(1, len(shape) - 1 if shape[0] == 0 else len(shape))
    dtype, centered = rng.choice(DTYPES), rng.random() < 0.5
    parameters = torch.float32 if dtype.itemsize == 2 and rng.random() < 0.3 else dtype
    weight = torch.randn(shape[-dims:], dtype=torch.float64).to(parameters) if rng.random() < 0.7 else None
    bias = torch.randn(shape[-dims:], dtype=torch.float64).to(parameters) if rng.random() < 0.5 else None
    dropout = rng.choice((0.0, 0.0, 0.3, 1.0))
    seed = torch.tensor(rng.randrange(-(2**63), 2**63)) if dropout else None
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    other = torch.randn(shape, dtype=torch.float64).to(dtype)
    eps = rng.choice((1e-5, 1e-2))
    kind = name.removeprefix("node.").removeprefix("_")
    if kind == "norm_backward":
        stats = [x.double().flatten(-dims).mean(-1)] if centered else []
        stats += [torch.rand(x.shape[:-dims], dtype=torch.float64) + 0.5]
        stats = torch.stack([t.reshape(-1) for t in stats]).to(
            torch.float64 if dtype == torch.float64 else torch.float32
        )
        d_sum = torch.randn(shape).to(dtype) if rng.random() < 0.5 else None
        wants = {f"wants_{of}": rng.random() < 0.8 for of in ("input", "weight", "bias")}
        return name, dict(
            centered=centered, dy=other, d_sum=d_sum, input=x, stats=stats, weight=weight, dims=dims, dropout=dropout,
            seed=seed, **wants,
        )  # fmt: skip
    row = dict(sizes=tuple(shape[-dims:])) if name.startswith("node.") else dict(dims=dims)
    residual = dict(residual=other) if kind == "add_norm" else {}
    drop = dict(dropout=dropout, seed=seed) if kind == "add_norm" else {}
    if name.startswith("node."):
        return name, dict(centered=centered, input=x, **residual, **row, weight=weight, bias=bias, eps=eps, **drop)
    return name, dict(centered=centered, input=x, **residual, weight=weight, bias=bias, **row, eps=eps, **drop)


# --- what may be wrong with an argument, or only look so ---


def _unaligned(t: Tensor) -> Tensor:
    if t.numel() == 0 or t.dtype not in DTYPES:
        return t
    room = torch.frombuffer(bytearray(t.nbytes + 9), dtype=t.dtype, offset=1, count=t.numel())
    return room.view(t.shape).copy_(t)


def _overlapping(t: Tensor) -> Tensor:
    return t if t.numel() == 0 else t.contiguous().as_strided(t.shape, [min(1, size - 1) for size in t.shape])


def _apart(t: Tensor) -> Tensor:
    return t if t.dim() == 0 else t.repeat_interleave(2, -1)[..., ::2]


def _offset(t: Tensor) -> Tensor:
    return torch.cat([torch.zeros(3).to(t.dtype), t.flatten()])[3:].view(t.shape)


def _expanded(t: Tensor) -> Tensor:
    return t if t.dim() == 0 or t.numel() == 0 else t[..., :1].clone().expand(t.shape)


def _resized(t: Tensor, less: int) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(max(0, t.untyped_storage().nbytes() - less))
    return t


HARMLESS = (
    _unaligned,
    _overlapping,
    _apart,
    _offset,
    _expanded,
    lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t,
    lambda t: torch._neg_view(t) if t.dtype in DTYPES else t,
    lambda t: t.clone().requires_grad_() if t.dtype in DTYPES else t,
)
HARMFUL = (
    lambda t: None,
    lambda t: 5,
    lambda t: "x",
    lambda t: [t],
    lambda t: t.flatten()[: t.numel() // 2],
    lambda t: t.unsqueeze(0),
    lambda t: t.flatten(),
    lambda t: t.new_empty(0),
    lambda t: t.sum(),
    lambda t: torch.cat([t.flatten(), t.flatten()]),
    lambda t: _resized(t, 1),
    lambda t: _resized(t, t.nbytes),
    lambda t: t.to_sparse(),
    lambda t: t.to("meta"),
    lambda t: t.unsqueeze(0).to_sparse_csr()[0] if t.dim() == 2 else t.to_sparse(),
    lambda t: t.float().to_mkldnn(),
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t: torch.nested.nested_tensor([t, t]),
    lambda t: torch.conj(t.to(torch.complex64)),
    *[lambda t, dtype=dtype: t.to(dtype) for dtype in OTHER_DTYPES],
)
NUMBERS = {
    "dims": (0, -1, 2, 99, 2**40, 1.5, None, "x"),
    "sizes": ((), (0,), (3, 3), (-1,), (2**70,), (3.0,), ("x",), 3, None, "x"),
    "eps": (-1.0, float("nan"), float("inf"), None, "x"),
    "dropout": (-0.1, 1.5, float("nan"), float("inf"), 0.0, 0.7, None, "x"),
    "library": (0, 12345, 2**70, None, "", "/nowhere.so", "a\0b", torch.__file__, b"x"),
    "reference": (None, 5, "x"),
}


def spoil(rng: random.Random, arguments: dict, name: str) -> bool:
    """Changes an argument; returns whether the call is still valid."""
    value = arguments[name]
    if name == "centered" or name.startswith("wants_"):
        arguments[name] = rng.choice((None, "x", 2.5, [True]))
    elif name in NUMBERS:
        arguments[name] = rng.choice(NUMBERS[name])
    else:
        is_harmless = rng.random() < 0.4
        is_tensor = isinstance(value, Tensor)
        base = value if is_tensor else torch.ones(rng.choice(((), (3,), (2, 3))))
        try:
            if is_tensor or not is_harmless:
                arguments[name] = rng.choice(HARMLESS if is_harmless else HARMFUL)(base.detach())
        except (RuntimeError, TypeError, ValueError):
            return True  # torch makes no such tensor
        return is_harmless
    return False


# --- the right answer ---


def _wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().resolve_neg().to(torch.float64)


def reference(name: str, a: dict) -> tuple[list[Tensor | None], float]:
    """Outputs in fp64 (None: not asked for), and by how much rounding is stretched."""
    x, weight, centered = _wide(a["input"]), _wide(a["weight"]), a["centered"]
    dims = len(a["sizes"]) if "sizes" in a else a["dims"]
    row = tuple(range(x.dim() - dims, x.dim()))
    alive = survival(x, a["dropout"], a["seed"]) if a.get("dropout") else None
    if name == "norm_backward":
        *mean, rstd = (t.view(*x.shape[: x.dim() - dims], *[1] * dims) for t in _wide(a["stats"]))
        normalized, dy = (x - (mean[0] if centered else 0.0)) * rstd, _wide(a["dy"])
        g = dy if weight is None else dy * weight
        dx = g - normalized * (g * normalized).mean(row, keepdim=True)
        dx = (dx - g.mean(row, keepdim=True) if centered else dx) * rstd
        dx = dx if a["d_sum"] is None else dx + _wide(a["d_sum"])
        rows = tuple(range(x.dim() - dims))
        over = lambda t: t.sum(rows) if rows else t  # noqa: E731
        found = [dx, dx if alive is None else dx * alive, over(dy * normalized), over(dy)]
        asked = (a["wants_input"], a["wants_input"] and alive is not None, a["wants_weight"], a["wants_bias"])
        return [t if wanted else None for t, wanted in zip(found, asked, strict=True)], 1.0
    outputs = []
    if "residual" in a:
        total = (x if alive is None else torch.where(alive > 0, x * alive, 0.0)) + _wide(a["residual"])
        dtype = torch.promote_types(a["input"].dtype, a["residual"].dtype)
        x = total.to(dtype).to(torch.float64)  # what is normalized is the rounded sum
        outputs = [total]
    mean = x.mean(row, keepdim=True) if centered else 0.0
    eps = a["eps"]
    if eps is None and name.startswith("node.") and not centered:
        eps = torch.finfo(torch.float64 if a["input"].dtype == torch.float64 else torch.float32).eps
    rstd = ((x - mean).square().mean(row, keepdim=True) + eps).rsqrt()
    y = (x - mean) * rstd * (1.0 if weight is None else weight) + (0.0 if a["bias"] is None else _wide(a["bias"]))
    stretch = max(1.0, float(rstd.max())) if rstd.numel() and not rstd.is_meta else 1.0
    return [y, *outputs], stretch * (1e3 if "residual" in a else 1.0)


def is_right(name: str, arguments: dict, found: tuple[Tensor, ...]) -> bool:
    """Whether an accepted call gave the right result."""
    try:
        expected, stretch = reference(name, arguments)
    except (RuntimeError, TypeError, AttributeError, KeyError, ValueError, IndexError):
        return False
    for o, e in zip(found, expected, strict=False):
        if e is None:
            if o.numel() != 0:
                return False
            continue
        if o.is_meta:
            return o.shape == e.shape
        slack = TOLERANCE[o.dtype] * stretch * (1.0 + float(e.abs().max()) if e.numel() else 1.0)
        if o.shape != e.shape or not torch.allclose(o.double(), e, atol=slack, rtol=0.0):
            return False
    return True


# --- the judgement ---


def invoke(name: str, arguments: dict):
    """The outputs as a tuple; None where the node leaves the call to others."""
    if name.startswith("node."):
        found = getattr(node, name.removeprefix("node."))(*arguments.values())
        return found if found is None or isinstance(found, tuple) else (found,)
    return getattr(torch.ops.lightning_optkit, name)(*arguments.values())


def is_named(name: str, arguments: dict, message: str) -> bool:
    """Whether a refusal names the entry and an argument, as ours or in the words of torch's dispatcher."""
    owner = name.removeprefix("node.")
    ours = re.match(rf"{owner}\((\w+)[.=]\S*.*\): .+\.$", message)
    theirs = re.match(rf"lightning_optkit::{owner}\(\) .*for argument '(\w+)'", message)
    match = ours or theirs
    return match is not None and match[1] in arguments


def refused_on_meta(name: str, arguments: dict) -> bool:
    """Whether tensors without numbers are refused in the same call."""
    try:
        invoke(name, {k: v.to("meta") if isinstance(v, Tensor) and k != "seed" else v for k, v in arguments.items()})
    except Exception:
        return True
    return False


def judge(name: str, arguments: dict, is_harmless: bool) -> tuple[str, str]:
    """(one of OUTCOMES, what was said)"""
    try:
        found = invoke(name, arguments)
    except Exception as error:
        message = str(error)
        if is_harmless:
            return "right_refused", message
        return ("refused" if is_named(name, arguments, message) else "refused_otherwise"), message
    if name == "node.connect":
        return ("accepted" if is_harmless else "accepted_wrong"), ""
    if found is None:
        return "passed_on", ""
    if not is_right(name, arguments, found):
        return "accepted_wrong", ""
    if name in OPS and refused_on_meta(name, arguments):
        return "meta_differs", "refused on the meta device only"
    return "accepted", ""


def fuzz(calls: int, seconds: float, seed: int) -> dict:
    """Counts by outcome, and the first three failures of each kind."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    counts, examples, begin = dict.fromkeys(OUTCOMES, 0), {kind: [] for kind in FAILURES}, time.monotonic()
    done = 0
    while done < calls and time.monotonic() - begin < seconds:
        name, arguments = right_call(rng)
        is_harmless = all(
            [spoil(rng, arguments, each) for each in rng.sample(list(arguments), rng.choice((0, 1, 1, 2)))]
        )
        outcome, message = judge(name, arguments, is_harmless)
        counts[outcome] += 1
        done += 1
        if outcome in FAILURES and len(examples[outcome]) < 3:
            examples[outcome].append(f"{name}({', '.join(map(_describe, arguments.items()))}): {message}")
    failed = sum(counts[kind] for kind in FAILURES)
    return dict(fuzz="norm_entries", seed=seed, calls=done, seconds=round(time.monotonic() - begin, 1), **counts,
                failed=failed, examples={kind: found for kind, found in examples.items() if found})  # fmt: skip


def _describe(item: tuple[str, object]) -> str:
    name, value = item
    if not isinstance(value, Tensor):
        return f"{name}={value!r}"
    if value.layout is not torch.strided or value.is_nested:
        return f"{name}={value.layout} {value.dtype}"
    return f"{name}={tuple(value.shape)}/{value.stride()} {value.dtype} {value.device}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    row = fuzz(**vars(parser.parse_args()))
    print(json.dumps(row))
    raise SystemExit(row["failed"] > 0)
