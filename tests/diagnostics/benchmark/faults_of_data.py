# SPDX-License-Identifier: Apache-2.0
"""Too few data for so long a run, and classes of very different frequency: what each may be called, and whom it hurts.

Neither is broken by a wrong setting, so neither is compared with the healthy setup, which has other data. A run that
learns by heart is hurt if stopping it at its least validation loss would have scored more; one with a dominant class,
if weighing its classes alike would have. Both were written down, with their traps, before the rules.
"""

import torch
import torch.nn.functional as F

import lightning_optkit as ok
from tests.diagnostics.benchmark.faults import Fault

_WRONG = 3  # one label of so many is drawn at random
_EPOCHS = 80


def few_samples(setup, count):
    """So few samples that they are learned by heart, of which a third has its label from another."""
    x, y, x_val, y_val = setup.data
    y = y[:count].clone()
    order = torch.randperm(count // _WRONG, generator=torch.Generator().manual_seed(setup.seed))
    y[: len(order)] = y[: len(order)][order]
    setup.epochs = min(_EPOCHS, setup.epochs * len(x) // count)
    setup.data = (x[:count], y, x_val, y_val)
    setup.batch_size = min(setup.batch_size, count // 3)


def _stopped_in_time(setup, count):
    few_samples(setup, count)
    setup.callbacks.append(ok.EarlyStoppingCriterion("GL", alpha=1e9, verbose=False))  # puts the best weights back


def dominant_class(setup, share):
    """This share of the samples is of the first class, by repetition; as many steps as before, the same validation."""
    x, y, x_val, y_val = setup.data
    first, others = (y == 0).nonzero()[:, 0], (y != 0).nonzero()[:, 0]
    wanted = round(share / (1 - share) * len(others))
    chosen = torch.cat([others, first.repeat(-(-wanted // len(first)))[:wanted]])
    setup.trainer["limit_train_batches"] = setup.steps_per_epoch
    setup.data = (x[chosen], y[chosen], x_val, y_val)


def weighted(setup, share):
    """The same with a loss that gives all classes the same weight."""
    dominant_class(setup, share)
    y = setup.data[1]
    if setup.kind == "binary":
        weight = (y == 0).sum() / (y == 1).sum()
        setup.loss = lambda out, y: F.binary_cross_entropy_with_logits(out, y, pos_weight=weight)
        return
    counts = torch.bincount(y)
    weights = len(y) / (len(counts) * counts)
    setup.loss = lambda out, y: F.cross_entropy(out, y, weight=weights.to(out.dtype))


def has_classes(setup):
    """Whether its targets are classes."""
    return setup.kind in ("classes", "binary")


OF_DATA = (
    Fault("few_samples", frozenset({"overfitting"}), (150, 100, 60), few_samples,
          lambda s: s.family != "autoencoder", False, _stopped_in_time),
    Fault("dominant_class", frozenset({"class_imbalance"}), (0.9, 0.97, 0.99), dominant_class, has_classes, False,
          weighted),
)  # fmt: skip
