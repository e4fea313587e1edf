# SPDX-License-Identifier: Apache-2.0
"""Random edited state dicts and calls of the compiled plan: each must succeed correctly or raise a clear error.

python tests/fuzz/fuzz_step_entries.py --calls 20000 --seconds 120 --seed 0
"""

import argparse
import copy
import json
import math
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_optkit import optimizers
from lightning_optkit._native import extension
from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import AutoClip, ClipNorm, ZClip
from tests.fuzz.cases import wrong_values

SHAPES = [(), (0,), (3,), (40, 7), (300,)]
RULES = [name for name in optimizers.__all__ if isinstance(getattr(optimizers, name), type) and name != "GroupTable"]
SENTENCE = re.compile(r"^(Plan|Membership|[A-Z]\w*)\b.*\.$", re.S)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64, torch.complex64]
FAILURES = ("changed", "no_sentence", "not_finite")


# --- state dicts ---


def an_optimizer(rng):
    """An optimizer after a step or two, with its parameters."""
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in rng.choices(SHAPES, k=rng.randint(1, 3))]
    cls = getattr(optimizers, rng.choice(RULES))
    choices = {
        "clip": [None, ClipNorm(1.0), AutoClip(window=5), ZClip()],
        "average": [None, None, EMA(0.9)],
        "state_dtype": [torch.float32, torch.bfloat16, "int8"],
        "rounding": ["nearest", "nearest", "kahan", "split24", "split32"],
    }
    try:
        optimizer = cls(params, **{name: rng.choice(values) for name, values in choices.items()})
    except ValueError:  # not every rule takes every stage
        optimizer = cls(params, clip=rng.choice(choices["clip"]))
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(rng.randint(0, 2)):
        step(optimizer, params)
    return optimizer, params


def step(optimizer, params):
    for p in params:
        p.grad = torch.randn_like(p) if p.numel() else torch.zeros_like(p)
    optimizer.step()


def places(value, path=()):
    """Paths to every entry of nested dicts and lists."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from places(inner, (*path, key))


def edited_tensor(rng, t):
    """A tensor that is almost `t`."""
    edits = [
        lambda: t[..., :-1] if t.dim() else t.expand(2), lambda: t.reshape(-1), lambda: torch.empty(0),
        lambda: t.to(rng.choice(DTYPES)), lambda: t.to("meta"), lambda: t.to_sparse() if t.dim() else t,
        lambda: torch.full_like(t, rng.choice([math.nan, math.inf, -1.0])) if t.is_floating_point() else t + 1,
        lambda: t.clone().expand(t.shape), lambda: torch.stack([t, t], -1)[..., 0], lambda: t[None],
        lambda: torch._neg_view(t) if t.is_floating_point() else t, lambda: t.tolist(), lambda: t.clone(),
        lambda: t.clone().requires_grad_() if t.is_floating_point() else t,
    ]  # fmt: skip
    return rng.choice(edits)()


def edit(rng, state_dict, values):
    """Changes, drops or adds one entry somewhere."""
    path = rng.choice(list(places(state_dict)) or [("state",)])
    holder = state_dict
    for key in path[:-1]:
        holder = holder[key]
    key, kind = path[-1], rng.random()
    if kind < 0.15:
        del holder[key]
    elif kind < 0.25 and isinstance(holder, dict):
        holder[rng.choice(["step", "exp_avg", "momentum_buffer", "lr", "unknown", 7])] = rng.choice(values)()
    elif isinstance(holder[key], torch.Tensor) and kind < 0.8:
        holder[key] = edited_tensor(rng, holder[key])
    else:
        holder[key] = rng.choice(values)()


def frozen(optimizer, params):
    def freeze(value):
        if isinstance(value, torch.Tensor):
            return str(value.dtype), tuple(value.shape), value.detach().reshape(-1).tolist().__repr__()
        if isinstance(value, dict):
            return {key: freeze(inner) for key, inner in value.items()}
        return [freeze(inner) for inner in value] if isinstance(value, list | tuple) else repr(value)

    return freeze([optimizer.state_dict(), params])


def load(rng, values):
    """Loads one edited state dict; returns the outcome."""
    optimizer, params = an_optimizer(rng)
    source = optimizer if rng.random() < 0.7 else an_optimizer(rng)[0]
    state_dict = copy.deepcopy(source.state_dict())
    try:
        for _ in range(rng.randint(0, 2)):
            edit(rng, state_dict, values)
    except (TypeError, IndexError, RuntimeError, NotImplementedError, ValueError, OverflowError):
        return "not_edited", ""  # what torch itself cannot make
    before = frozen(optimizer, params)
    try:
        optimizer.load_state_dict(state_dict)
    except (TypeError, ValueError) as error:
        if frozen(optimizer, params) != before:
            return "changed", str(error)
        return ("refused", "") if SENTENCE.match(str(error)) else ("no_sentence", str(error))
    if hasattr(optimizer, "train"):
        optimizer.train()
    step(optimizer, params)
    return "accepted", ""


# --- the plan ---


def tensors(rng):
    shape = rng.choice([(8,), (8,), (8,), (3,), (2, 4), ()])
    t = torch.zeros(shape, dtype=rng.choice([torch.float32] * 4 + DTYPES))
    return edited_tensor(rng, t) if rng.random() < 0.2 else t


def plan_calls(rng, values):
    """Makes random calls of a plan, in any order; returns the outcome."""
    outcomes = Counter()
    rule = rng.choice([*extension.rules(), "nonsense"])
    device, is_double = rng.choice([-1, -1, -1, 0]), rng.random() < 0.1
    try:
        plan = extension.Plan(rule, is_double, device)
    except (ValueError, RuntimeError):
        return Counter(refused=1)
    states, scalars, hyperparameters = extension.rules()[rule]
    held = []

    def add():
        state = {name: tensors(rng) for name in [*states, *filter(None, scalars)]}
        state |= {f"{name}_scale": torch.zeros(rng.choice([0, 1, 3])) for name in states if rng.random() < 0.2}
        state["step"] = torch.zeros(()) if rng.random() < 0.9 else tensors(rng)
        if rng.random() < 0.3:
            state |= {"ema": tensors(rng), "num_averaged": torch.zeros(())}
        if rng.random() < 0.3:
            state["compensation"] = tensors(rng)
        if rng.random() < 0.5:  # one that is right
            state |= {name: torch.zeros(8) for name in states}
            state |= {name: torch.zeros(()) for name in scalars if name}
        param = torch.zeros(8) if rng.random() < 0.8 else tensors(rng)
        plan.add_tensor(
            param=param, state=state, states=[s if rng.random() < 0.95 else None for s in states],
            scales=[f"{s}_scale" for s in states], scalars=[s for s in scalars if s],
            average=rng.choice([None, None, "ema"]), unsigned_states=rng.choice([0, 1, 2**31]),
            group=rng.choice([0, 0, 0, 1, -1, 10**6]), tensor_index=rng.choice([0, 3, -1]),
        )  # fmt: skip
        held.append((param, state))

    def bind():
        chosen = held if rng.random() < 0.8 else held[:1]
        grads = [torch.ones(8) if rng.random() < 0.8 else rng.choice([tensors(rng), None]) for _ in chosen]
        lists = [[p for p, _ in chosen], [s for _, s in chosen], grads]
        plan.bind(*lists, rng.choice([0, 0, 0, 1, -1]))
        if rng.random() < 0.2:
            rng.choice(lists).clear()
        if chosen and rng.random() < 0.2:
            chosen[0][0].data = torch.zeros(rng.choice([8, 3]))

    def a_row():
        bounds = ("clip_value", "clip_tensor_norm", "clip_unit_ratio")
        row = [math.inf if name in bounds and rng.random() < 0.9 else 0.0 for name in extension.GROUP_FIELDS]
        row[extension.GROUP_FIELDS.index("rounding")] = rng.choice([0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 9.0, math.nan])
        row[extension.GROUP_FIELDS.index("average_kind")] = rng.choice([0.0, 0.0, 0.0, 1.0, 2.0, -3.0])
        return row + [0.5] * rng.choice([len(hyperparameters)] * 9 + [0])

    calls = {
        "add_tensor": add,
        "bind": bind,
        "set_active": lambda: plan.set_active(rng.choice([list(range(len(held))), [0], [1, 0], [99], [-1], []])),
        "norm": plan.norm,
        "check": plan.check,
        "release": plan.release,
        "step": lambda: plan.step([a_row() for _ in range(rng.choice([1, 1, 2, 0]))], 1.0, rng.random() < 0.5),
        "sums": plan.sums,
        "observed": plan.observed,
        "cuda_norm": lambda: plan.cuda_norm(torch.zeros(2, dtype=torch.float64), 0),
        "wrong kind": lambda: getattr(plan, rng.choice(["bind", "step", "norm"]))(
            *[v() for v in rng.choices(values, k=3)]
        ),
    }
    for name in ["add_tensor", "set_active", "bind", "step", *rng.choices(list(calls), k=12)]:
        try:
            calls[name]()
            outcomes["accepted"] += 1
        except (ValueError, TypeError, RuntimeError, extension.Moved):
            outcomes["refused"] += 1
    return outcomes


def fuzz(calls, seconds, seed):
    """Counts outcomes of random calls; prints what failed."""
    rng, start, counts = random.Random(seed), time.time(), Counter()
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        values = wrong_values(Path(folder))
        while sum(counts.values()) < calls and time.time() - start < seconds:
            if extension is not None and rng.random() < 0.3:
                counts += plan_calls(rng, values)
                continue
            outcome, said = load(rng, values)
            counts[outcome] += 1
            if outcome in FAILURES:
                print(f"{outcome}: {said}", file=sys.stderr)
    return {"fuzz": "step_entries", "seed": seed, "seconds": round(time.time() - start, 1), **counts}


def main():
    """Prints one JSON row; exit status 1 if a call failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    row = fuzz(arguments.calls, arguments.seconds, arguments.seed)
    print(json.dumps(row))
    return int(any(row.get(name) for name in FAILURES))


if __name__ == "__main__":
    sys.exit(main())
