# SPDX-License-Identifier: Apache-2.0
"""Dead ReLUs for five causes, vanishing gradients for four: does the first verdict name the cause or the consequence?

What a cause may be called, and which word its sentence must hold, was written down before the first run. A run counts
if the network was hurt (as in the benchmark) and has the consequence: over half of the ReLUs of a layer give 0 for all
of 512 samples at the end, or the gradient at the first layer, compared with that at the last, is below a tenth of the
healthy twin's, at the start or at the end. (Weights that are too large saturate units, but their gradient does not
vanish: it had fallen so far in 1 of 24 runs. So they are no cause here.)

python -m tests.diagnostics.benchmark.causes --per-cause 12 --rows build/causes.jsonl
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn

from tests.diagnostics.benchmark import consequences, families, runs
from tests.diagnostics.benchmark import families_of_causes as networks
from tests.diagnostics.benchmark.__main__ import MIN_LOSS
from tests.diagnostics.benchmark.faults import layers_of
from tests.diagnostics.benchmark.faults_of_learning import BadBatch
from tests.diagnostics.benchmark.rows import written
from tests.diagnostics.benchmark.table import SILENT, claim

MIN_TWIN = 0.3  # the healthy twin must learn so much
_HALF, _TENTH = 0.5, 0.1


@dataclass(frozen=True)
class Cause:
    """One way to get one of the two consequences.

    Args:
        consequence: "dead" or "vanishing".
        name: Its name; several ways may share it.
        accepted: Verdicts that name it, and a word that their cause must hold.
        apply: Changes a setup.
        fits: Whether it can be planted in a setup.
    """

    consequence: str
    name: str
    accepted: dict[str, str]
    apply: Callable
    fits: Callable = lambda setup: True

    def is_named_by(self, verdict):
        """Whether the verdict says this cause."""
        return verdict.symptom in self.accepted and self.accepted[verdict.symptom] in verdict.cause


class _Watch(pl.Callback):
    """Measures the consequences before the first step and after the last one."""

    def __init__(self, setup):
        self._setup, self.dead, self.fading = setup, [], []

    def _measure(self, module):
        self.dead.append(consequences.dead_share(self._setup, module))
        self.fading.append(consequences.fading(self._setup, module))

    def on_train_start(self, trainer, pl_module):
        self._measure(pl_module)

    def on_train_end(self, trainer, pl_module):
        self._measure(pl_module)


def _bias(where, bias):
    def apply(setup):
        hidden = layers_of(setup)[:-1]
        for layer in hidden if where == "all" else hidden[len(hidden) // 2 :][:1]:
            nn.init.constant_(layer.bias, -bias)

    return apply


def _rate(factor):
    def apply(setup):
        setup.lr_factor = factor

    return apply


def _inputs(change):
    def apply(setup):
        x, y, x_val, y_val = setup.data
        setup.data = (change(x), y, change(x_val), y_val)

    return apply


def _one_feature(x):
    x = x.clone()
    x.reshape(len(x), -1)[:, ::5] *= 1e4
    return x


def _weights(factor, where="all"):
    def apply(setup):
        layers = layers_of(setup)
        for layer in layers[:1] if where == "first" else layers:
            with torch.no_grad():
                layer.weight *= factor

    return apply


def _zeros(where):
    def apply(setup):
        hidden = layers_of(setup)[:-1]
        for layer in hidden[:1] if where == "first" else hidden:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    return apply


def _targets(scale):
    def apply(setup):
        setup.target = lambda y: 10 * scale + scale * y

    return apply


def _summed(setup):
    setup.loss = lambda out, y: F.cross_entropy(out, y, reduction="sum")


def _bad_batch(factor):
    def apply(setup):
        setup.callbacks.append(BadBatch(factor))

    return apply


def _sigmoids(depth):
    def apply(setup):
        first = layers_of(setup)[0]
        width = next(m for m in setup.head.modules() if isinstance(m, nn.Linear)).in_features
        layers = [first]
        for place in range(depth):
            layers += [nn.Sigmoid(), nn.Linear(width if place else first.out_features, width)]
        setup.body = nn.Sequential(*layers, nn.Sigmoid())

    return apply


def _is_dense(setup):
    return not any(isinstance(m, nn.Conv2d) for m in setup.body.modules())


def _is_regression(setup):
    return setup.kind == "regression"


def _sums(setup):
    return setup.kind == "classes" and setup.optimizer.startswith("sgd")


def _dead(name, accepted, *ways, fits=lambda setup: True):
    return [Cause("dead", name, accepted, way, fits) for way in ways]


def _vanishing(name, accepted, *ways, fits=lambda setup: True):
    return [Cause("vanishing", name, accepted, way, fits) for way in ways]


CAUSES = (
    *_dead("bias", {"dead_units": "bias"}, _bias("all", 3.0), _bias("all", 10.0), _bias("one", 30.0)),
    *_dead("rate", {"lr_too_high": ""}, _rate(30.0), _rate(100.0), _rate(300.0)),
    *_dead("inputs", {"unnormalized_input": ""}, _inputs(lambda x: 100 * x), _inputs(lambda x: 1e3 * x),
           _inputs(lambda x: x - 100), _inputs(lambda x: x + 1e3), _inputs(_one_feature)),
    *_dead("weights of zero", {"symmetric_init": "", "bad_init_scale": "small"}, _zeros("first"), _zeros("all"),
           _weights(1e-3)),
    *_dead("explosion", {"unscaled_target": ""}, *map(_targets, (10.0, 30.0, 100.0)), fits=_is_regression),
    *_dead("explosion", {"lr_too_high": ""}, _summed, fits=_sums),
    *_dead("explosion", {"loss_spike": "", "unnormalized_input": ""}, *map(_bad_batch, (30.0, 100.0, 1e3)),
           fits=lambda s: s.optimizer.startswith("sgd")),  # Adam bounds its steps
    *_vanishing("activation", {"vanishing_gradient": "sigmoid"}, *map(_sigmoids, (4, 6, 8)), fits=_is_dense),
    *_vanishing("small weights", {"bad_init_scale": "small"}, *map(_weights, (0.1, 0.03, 0.01))),
    *_vanishing("inputs", {"unnormalized_input": ""}, _inputs(lambda x: 100 * x), _inputs(lambda x: 1e3 * x),
                _inputs(lambda x: x + 100), _inputs(_one_feature)),
    *_vanishing("rate", {"lr_too_high": ""}, _rate(30.0), _rate(100.0), _rate(300.0)),
)  # fmt: skip


def chosen(consequence, held_out):
    """The networks in which a consequence is planted."""
    if consequence == "dead":
        return networks.RELU_HELD_OUT if held_out else networks.RELU
    return networks.SQUASHING_HELD_OUT if held_out else networks.SQUASHING


@cache
def _twin(family, seed):
    setup = families.build(family, seed)
    watch = _Watch(setup)
    setup.callbacks.append(watch)
    return runs.diagnosed(setup)[1], watch.fading, watch.dead


def run(consequence, name, index, held_out):
    """One run of a cause, by number: family, seed and way are drawn by the number."""
    drawn = random.Random(f"{consequence} {name} {index} {held_out}")
    ways = [cause for cause in CAUSES if (cause.consequence, cause.name) == (consequence, name)]
    while True:
        family, seed, cause = drawn.choice(chosen(consequence, held_out)), drawn.randrange(10_000), drawn.choice(ways)
        setup = families.build(family, seed)
        if cause.fits(setup):
            break
    cause.apply(setup)
    watch = _Watch(setup)
    setup.callbacks.append(watch)
    verdicts, score = runs.diagnosed(setup)
    twin, fading, dead = _twin(family, seed)
    has = watch.dead[-1] > _HALF >= dead[-1] if consequence == "dead" else _fades(watch.fading, fading)
    return dict(
        consequence=consequence, cause=name, index=index, held_out=held_out, way=ways.index(cause), seed=seed,
        family=setup.family, optimizer=setup.optimizer, score=round(score, 3), twin=round(twin, 3),
        dead=watch.dead, fading=watch.fading, counts=bool(has and twin > MIN_TWIN and score < twin - MIN_LOSS),
        accepted=cause.accepted, named=bool(verdicts) and cause.is_named_by(verdicts[0]),
        primary=verdicts[0].symptom if verdicts else None, verdicts=[str(verdict) for verdict in verdicts],
    )  # fmt: skip


def _fades(seen, of_twin):
    return any(now < _TENTH * healthy for now, healthy in zip(seen, of_twin, strict=True))


def summary(rows):
    """Lines of the counts."""
    lines = []
    for held_out in (False, True):
        where = "held out" if held_out else "calibration"
        for consequence in ("dead", "vanishing"):
            counted = [r for r in rows if r["counts"] and (r["held_out"], r["consequence"]) == (held_out, consequence)]
            if not counted:
                continue
            lines.append(f"{consequence}, {where}: cause named first {_claimed(counted)}")
            for name in dict.fromkeys(row["cause"] for row in counted):
                of_cause = [row for row in counted if row["cause"] == name]
                others = [row["primary"] or SILENT for row in of_cause if not row["named"]]
                lines.append(f"  {name}: {_claimed(of_cause)} {', '.join(others)}")
    lines.append(f"runs that were not hurt, or have not the consequence: {sum(not row['counts'] for row in rows)}")
    return lines


def _claimed(rows):
    return claim(sum(row["named"] for row in rows), len(rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-cause", type=int, default=12, help="runs that count, of each cause")
    parser.add_argument("--held-out", type=int, default=0, help="the same in the held-out families")
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--only", nargs="*", help='such as "dead bias"')
    parser.add_argument("--rows", type=Path, help="file for one JSON row per run")
    arguments = parser.parse_args()
    print("\n".join(summary(written(_planned(arguments), arguments.rows))))


def _planned(arguments):
    names = dict.fromkeys((cause.consequence, cause.name) for cause in CAUSES)
    for held_out, wanted in ((False, arguments.per_cause), (True, arguments.held_out)):
        for consequence, name in names:
            if arguments.only and f"{consequence} {name}" not in arguments.only:
                continue
            counted, index = 0, arguments.first
            while counted < wanted and index < arguments.first + 3 * wanted:
                row = run(consequence, name, index, held_out)
                counted, index = counted + row["counts"], index + 1
                yield row


if __name__ == "__main__":
    main()
