# SPDX-License-Identifier: Apache-2.0
"""The constant prediction of a whole validation is that of all of its targets, in whatever batches they come."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_optkit.diagnostics.measure.targets import CalledTargets

GENERATOR = torch.Generator().manual_seed(0)
CLASSES = torch.randint(0, 3, (90,), generator=GENERATOR).sort().values  # a batch has one class or two
NUMBERS = 1e6 + torch.randn(90, 2, generator=GENERATOR).double().sort(0).values
LOGITS = torch.randn(90, 3, generator=GENERATOR)


def seen(loss, *tensors, batch=16):
    targets = CalledTargets()
    for parts in zip(*(each.split(batch) for each in tensors), strict=True):
        targets.next_batch()
        with targets:
            loss(*parts)
    return targets.seen()


def test_squared_errors_have_the_variance():
    found = seen(F.mse_loss, torch.zeros(90, 2), NUMBERS)
    assert found.constant == pytest.approx(float(NUMBERS.var(0).mean())) and found.samples == 90 and found.is_squared


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda x, y: F.nll_loss(F.log_softmax(x, 1), y)])
def test_classes_have_the_entropy_of_their_counts(loss):
    shares = CLASSES.bincount().double() / 90
    found = seen(loss, LOGITS, CLASSES)
    assert found.constant == pytest.approx(float(torch.special.entr(shares).sum()) + 2 / 180)
    assert found.samples == 90 and not found.is_squared and found.counts == tuple(CLASSES.bincount().tolist())


def test_ignored_targets_do_not_count_and_binary_ones_have_two_classes():
    left = CLASSES.clone()
    left[::2] = -100
    shares = CLASSES[1::2].bincount().double() / 45
    assert seen(F.cross_entropy, LOGITS, left).constant == pytest.approx(
        float(torch.special.entr(shares).sum()) + 2 / 90
    )
    share = float((CLASSES == 0).double().mean())
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    found = seen(F.binary_cross_entropy_with_logits, LOGITS[:, 0], (CLASSES == 0).float())
    assert found.constant == pytest.approx(entropy + 1 / 180)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1),
        lambda x, y: F.cross_entropy(x, y, torch.ones(3)),
        lambda x, y: F.cross_entropy(x, y, reduction="sum"),
        lambda x, y: F.cross_entropy(x, F.one_hot(y, 3).float()),
        lambda x, y: F.l1_loss(x[:, 0], y.float()),
        lambda x, y: F.mse_loss(x[:, 0], y.float()[:, None]),
        lambda x, y: (F.cross_entropy(x, y), F.cross_entropy(x, y)),
        lambda x, y: F.cross_entropy(x, y) if len(y) == 16 else F.mse_loss(x[:, 0], y.float()),
        lambda x, y: F.mse_loss(x[: len(y)].sum(), y.float().sum()),
        lambda x, y: x.sum(),
    ],
)
def test_what_no_sum_tells_is_unknown(loss):
    assert seen(loss, LOGITS, CLASSES) is None


def test_a_single_sample_has_no_variance():
    assert seen(F.mse_loss, torch.zeros(1, 2), NUMBERS[:1]) is None


def test_a_loss_inside_vmap_is_unknown():
    per_sample = torch.func.vmap(lambda x, y: F.cross_entropy(x[None], y[None]))
    assert seen(per_sample, LOGITS, CLASSES) is None
