# SPDX-License-Identifier: Apache-2.0
"""Tasks of which the inputs say little: no label is wrong there, and none may be called so.

Regressions on ten normal inputs that explain 2 to 9 % of the targets, and classifications of which 85 or 92 % of the
labels are drawn from the others, in training and validation alike. Rates are those of a healthy run, and a third.
A run that learns noise by heart before anything else cannot be told from shuffled labels by its losses.

python -m tests.diagnostics.benchmark.weak_signals --rows build/weak_signals.jsonl
"""

import argparse
import itertools
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tests.diagnostics.benchmark import families, runs
from tests.diagnostics.benchmark.rows import written

_REGRESSIONS = [*itertools.product((0.15, 0.2, 0.3), ((1200, 600, 6), (400, 100, 20), (1200, 300, 15)), (1e-3, 3e-3))]
_FAMILIES = ("mlp", "cnn", "deep_mlp", "transformer", "logistic", "tanh_mlp")
_CLASSIFICATIONS = [*itertools.product((0.92, 0.85), _FAMILIES, (1.0, 0.3))]


def regression(seed, scale, sizes, rate):
    """So many standard deviations of the targets per one of the first input, to which the noise adds one."""
    train, val, epochs = sizes
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(train + val, 10, generator=generator), torch.randn(train + val, generator=generator)
    y = scale * x[:, 0] + noise
    y = (y - y[:train].mean()) / y[:train].std()
    torch.manual_seed(seed)
    body, head = nn.Sequential(nn.Linear(10, 64), nn.ReLU()), nn.Sequential(nn.Linear(64, 1), nn.Flatten(0))
    data = (x[:train], y[:train], x[train:], y[train:])
    return families.Setup("weak", seed, body, head, data, F.mse_loss, "regression", (rate, 10 * rate), epochs, 32)


def classification(seed, share, family, factor):
    """A family with this share of its labels exchanged, in training and validation."""
    setup, generator = families.build(getattr(families, family), seed), torch.Generator().manual_seed(seed)
    x, y, x_val, y_val = setup.data
    setup.data = (x, _exchanged(y, share, generator), x_val, _exchanged(y_val, share, generator))
    setup.optimizer, setup.lr_factor = "adamw", factor
    setup.trainer.pop("precision", None)
    return setup


def _exchanged(y, share, generator):
    chosen = torch.randperm(len(y), generator=generator)[: int(share * len(y))]
    y = y.clone()
    y[chosen] = y[chosen[torch.randperm(len(chosen), generator=generator)]]
    return y


def _rows(first):
    for index, (scale, sizes, rate) in enumerate(_REGRESSIONS):
        yield _row("regression", (scale, *sizes, rate), regression(first + index, scale, sizes, rate))
    for index, (share, family, factor) in enumerate(_CLASSIFICATIONS):
        setup = classification(first + 100 + index, share, family, factor)
        yield _row(f"{share:.0%} noise", (family, factor), setup)


def _row(kind, settings, setup):
    verdicts, score = runs.diagnosed(setup)
    primary = verdicts[0].symptom if verdicts else None
    return dict(kind=kind, settings=settings, seed=setup.seed, primary=primary, score=round(score, 3))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--rows", type=Path, help="file for one JSON row per run")
    arguments = parser.parse_args()
    rows = written(_rows(arguments.first), arguments.rows)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        said = Counter(row["primary"] or "(none)" for row in rows if row["kind"] == kind)
        print(f"{kind}: {', '.join(f'{name} {count}' for name, count in said.most_common())}")


if __name__ == "__main__":
    main()
