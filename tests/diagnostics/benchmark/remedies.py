# SPDX-License-Identifier: Apache-2.0
"""Does the remedy of the first verdict cure, pasted as it stands into the broken program?

Only runs that the fault hurts are taken. What stands in front of the first ", or" is the code. It is pasted by form: a
callback into the Trainer, `lr=` into the optimizer, a statement about `self` behind `__init__`, and so on; what a form
does is independent of the fault. Remedies that ask for an edit of the user's own code (leave out a softmax, a
`detach()`), or for a look at the data, are not pasted, and counted apart. A run is cured if its score is less than
`MIN_LOSS` below that of the healthy twin, as in the benchmark.

python -m tests.diagnostics.benchmark.remedies --runs 120 --rows build/remedies.jsonl
"""

import argparse
import ast
import re
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn

import lightning_optkit as ok
from tests.diagnostics.benchmark import runs
from tests.diagnostics.benchmark.__main__ import FAULTS, MIN_LOSS, drawn_fault, twin_score
from tests.diagnostics.benchmark.rows import written
from tests.diagnostics.benchmark.table import claim

_NAMES = {"ok": ok, "torch": torch, "nn": nn, "F": F}


def paste(setup, remedy):
    """Changes the setup as the remedy says; returns the code that was pasted, or None if it is not code."""
    for form in (
        _callback,
        _rate,
        _statement,
        _mode,
        _parameters,
        _zeroing,
        _batch,
        _target,
        _loss,
        _activation,
        _schedule,
        _sampler,
    ):
        pasted = form(setup, remedy)
        if pasted is not None:
            return pasted
    return None


def _callback(setup, remedy):
    code = _leading_call(remedy) if remedy.startswith("ok.") else None
    if code is None:
        return None
    made = eval(code, _NAMES)
    if isinstance(made, ok.Fuse) and setup.optimizer == "ok.adamw":  # "takes it itself"
        setup.stages = {"rounding": made._rounding}
        return code
    if isinstance(made, ok.Fuse):
        setup.optimizer = "adamw" if setup.optimizer == "fuse" else setup.optimizer
    setup.callbacks = [each for each in setup.callbacks if type(each) is not type(made)] + [made]
    return code


def _leading_call(text):
    for place, letter in enumerate(text):
        if letter == ")":
            try:
                ast.parse(text[: place + 1], mode="eval")
            except SyntaxError:
                continue
            return text[: place + 1]
    return None


def _rate(setup, remedy):
    found = re.match(r"lr=([\d.e+-]+)", remedy)
    if found is None:
        return None
    lr = float(found[1].rstrip("."))
    setup.lrs, setup.lr_factor = (lr, lr / 4 if setup.optimizer == "sgd_plain" else lr), 1.0
    return found[0]


class _Program(nn.Module):
    def __init__(self, setup):
        super().__init__()
        self.body, self.head = setup.body, setup.head


def _statement(setup, remedy):
    if not remedy.startswith("torch.nn.init."):
        return None
    code = _leading_call(remedy)
    exec(code, {**_NAMES, "self": _Program(setup)})
    return code


class _Training(pl.Callback):
    """What the hook of a module would do."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.train()


def _mode(setup, remedy):
    if remedy.startswith("self.train() in on_train_batch_start"):
        setup.callbacks.append(_Training())
        return "self.train()"
    if not remedy.startswith("self.train() in on_train_start"):
        return None
    before = setup.at_start

    def at_start(module):
        if before is not None:
            before(module)
        module.train()

    setup.at_start = at_start
    return "self.train()"


def _parameters(setup, remedy):
    if "(self.parameters(), ...)" not in remedy:
        return None
    setup.optimized = lambda module: module.parameters()
    return "self.parameters()"


def _zeroing(setup, remedy):
    if not remedy.startswith("optimizer.zero_grad()"):
        return None
    setup.zeroes = True
    return "optimizer.zero_grad()"


def _batch(setup, remedy):
    if not remedy.startswith("torch.nan_to_num(x)"):
        return None
    forward = setup.forward
    setup.forward = lambda body, head, x: forward(body, head, torch.nan_to_num(x))
    return "torch.nan_to_num(x)"


def _target(setup, remedy):
    found = re.match(r"y = (\(.*\) / \S+) in training_step and validation_step", remedy)
    if found is None:
        return None
    target, trained = setup.target, setup.data[1]
    setup.target = lambda y: eval(found[1], {"y": target(y), "y_train": target(trained)})
    return found[1]


def _loss(setup, remedy):
    loss = setup.loss
    if remedy.startswith("F.cross_entropy on the logits"):
        setup.loss = F.cross_entropy
        return "F.cross_entropy"
    summed = re.match(r'reduction="mean" in F\.(\w+)', remedy)
    if summed is not None:
        setup.loss = getattr(F, summed[1])
        return summed[0]
    if remedy.startswith("output.squeeze(-1)"):
        setup.loss = lambda output, target: loss(output.squeeze(-1), target)
        return "output.squeeze(-1)"
    return None


def _activation(setup, remedy):
    found = re.match(r"nn\.(\w+)\(\) in place of nn\.(\w+)\(\), with (.*)", remedy)
    if found is None:
        return None
    old = getattr(nn, found[2])
    for module in [*setup.body.modules(), *setup.head.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, old):
                setattr(module, name, getattr(nn, found[1])())
    return f"{found[1]}; {_callback(setup, found[3])}"


def _schedule(setup, remedy):
    if not remedy.startswith('{"scheduler": scheduler'):
        return None
    code, before = remedy[: remedy.index("}") + 1], setup.schedule
    setup.schedule = lambda *args: eval(code, {"scheduler": before(*args)["scheduler"]})
    return code


def _sampler(setup, remedy):
    if "as sampler of the DataLoader" not in remedy:
        return None
    code = _leading_call(remedy)
    setup.sampler = lambda y: eval(code, {**_NAMES, "y": y})
    return code


class _Transformed(nn.Module):
    """The module behind what `Preprocess` does to its inputs, as a user predicts with it."""

    def __init__(self, module, callbacks):
        super().__init__()
        self.module, self.dtype = module, module.dtype
        chosen = [each for each in callbacks if isinstance(each, ok.Preprocess)]
        self.transforms = [each.transform for each in chosen]

    def forward(self, x):
        for transform in self.transforms:
            x = transform(x)
        return self.module(x)


def run(index, held_out, faults=FAULTS):
    """One run by number, and its repetition with the remedy pasted; None if it was not hurt."""
    setup, fault, strength = drawn_fault(index, held_out, faults)
    verdicts, score = runs.diagnosed(setup)
    healthy = twin_score(setup, fault, strength)
    if score >= healthy - MIN_LOSS:
        return None
    row = dict(
        fault=fault.name, strength=strength, family=setup.family, seed=setup.seed, held_out=held_out,
        optimizer=setup.optimizer, score=round(score, 3), twin=round(healthy, 3),
        primary=verdicts[0].symptom if verdicts else None, remedy=verdicts[0].remedy if verdicts else None,
        is_named=bool(verdicts) and verdicts[0].symptom in fault.accepted, pasted=None, cured=None,
    )  # fmt: skip
    if not verdicts:
        return row
    again, _, _ = drawn_fault(index, held_out, faults)
    row["pasted"] = paste(again, verdicts[0].remedy)
    if row["pasted"] is not None:
        later, module = runs.fitted(again)
        after = runs.score(again, _Transformed(module, again.callbacks))
        row |= dict(after=round(after, 3), cured=after >= healthy - MIN_LOSS, then=[v.symptom for v in later])
    return row


def summary(rows):
    """Lines of the counts."""
    said = [row for row in rows if row["primary"]]
    pasted = [row for row in said if row["pasted"] is not None]
    lines = [
        f"hurt: {len(rows)}; with a verdict: {len(said)}; whose remedy is code: {len(pasted)}",
        f"cured by it: {claim(sum(row['cured'] for row in pasted), len(pasted))}",
    ]
    for name in dict.fromkeys(row["primary"] for row in said):
        of_symptom = [row for row in said if row["primary"] == name]
        code = [row for row in of_symptom if row["pasted"] is not None]
        missed = [f"{row['fault']} in {row['family']}" for row in code if not row["cured"]]
        rest = f", {len(of_symptom) - len(code)} not code" if len(code) < len(of_symptom) else ""
        lines.append(f"  {name}: {sum(row['cured'] for row in code)}/{len(code)}{rest} {'; '.join(missed)}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=120)
    parser.add_argument("--held-out", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--only", nargs="*", help="names of faults")
    parser.add_argument("--rows", type=Path, help="file for one JSON row per run")
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if not arguments.only or fault.name in arguments.only]
    planned = (
        run(index, held_out, faults)
        for held_out, count in ((False, arguments.runs), (True, arguments.held_out))
        for index in range(arguments.first, arguments.first + count)
    )
    print("\n".join(summary(written((row for row in planned if row is not None), arguments.rows))))


if __name__ == "__main__":
    main()
