# SPDX-License-Identifier: Apache-2.0
"""What exchanged targets would cost is known from one matrix, and is what the loss functions of torch say of them."""

import pytest
import torch
import torch.nn.functional as F

from lightning_optkit.diagnostics.measure.associations import CalledAssociations

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(60, 3, generator=GENERATOR)
CLASSES = torch.randint(0, 3, (60,), generator=GENERATOR)
LOGITS[torch.arange(60), CLASSES] += 0.5
NUMBERS = LOGITS + torch.randn(60, 3, generator=GENERATOR)
PLACES = torch.randint(0, 3, (60, 5), generator=GENERATOR)
PLACES[:, 3] = -100
CASES = {
    "classes": (F.cross_entropy, LOGITS, CLASSES),
    "logarithms": (F.nll_loss, LOGITS.log_softmax(1), CLASSES),
    "several places": (F.cross_entropy, LOGITS[:, :, None] + torch.arange(5.0), PLACES[:, :3].repeat(1, 2)[:, :5]),
    "numbers": (F.mse_loss, LOGITS, NUMBERS),
    "binary": (F.binary_cross_entropy_with_logits, LOGITS[:, 0], (CLASSES == 0).float()),
    "probabilities": (F.binary_cross_entropy, LOGITS[:, 0].sigmoid(), (CLASSES == 0).float()),
}


def seen(loss, *tensors, batch=20):
    called = CalledAssociations()
    for parts in zip(*(each.split(batch) for each in tensors), strict=True):
        called.next_batch()
        with called:
            loss(*parts)
    return called.seen()


@pytest.mark.parametrize("case", CASES)
def test_the_gain_and_its_error_are_those_of_targets_exchanged_within_batches(case):
    loss, given, target = CASES[case]
    found = seen(loss, given, target)
    exchanged = []
    for _ in range(2000):
        order = torch.cat([20 * i + torch.randperm(20, generator=GENERATOR) for i in range(3)])
        exchanged.append(float(loss(given, target[order])))
    exchanged = torch.tensor(exchanged)
    assert found.samples == 60
    assert found.error == pytest.approx(float(exchanged.std()), rel=0.1)
    assert found.gain == pytest.approx(float(exchanged.mean() - loss(given, target)), abs=0.15 * found.error)


def test_batches_that_go_one_way_and_the_other_scatter_by_more_than_chance():
    turned = F.one_hot(CLASSES, 3).float()
    turned[20:40] *= -1
    for given, is_more in ((LOGITS[torch.randperm(60, generator=GENERATOR)], False), (turned, True)):
        found = seen(F.cross_entropy, given, CLASSES)
        assert found.batches == 3 and (found.scatter > 3) == is_more


def test_predictions_that_differ_by_rounding_say_nothing():
    for difference, batches in ((0.0, 0), (1e-8, 0), (1e-4, 3)):
        found = seen(F.cross_entropy, torch.tensor([3.0, 1.0, 0.0]) + difference * LOGITS.double(), CLASSES)
        assert found.batches == batches and (found.error == 0.0 and found.gain == 0.0) == (batches == 0)


def test_ignored_targets_add_nothing():
    given = LOGITS[:, :, None] + 0.1 * torch.randn(60, 3, 5, generator=GENERATOR)
    ragged = torch.where(torch.rand(60, 5, generator=GENERATOR) < 0.4, -100, CLASSES[:, None].expand(60, 5))
    found, share = seen(F.cross_entropy, given, ragged, batch=60), float((ragged != -100).float().mean())
    orders = [torch.randperm(60, generator=GENERATOR) for _ in range(2000)]
    exchanged = sum(float(F.cross_entropy(given, ragged[order])) for order in orders) / len(orders)
    gain = share * (exchanged - float(F.cross_entropy(given, ragged)))
    assert found.gain == pytest.approx(gain, abs=0.15 * found.error) and found.gain > 2 * found.error


def test_targets_that_do_not_vary_within_a_batch_say_nothing():
    found = seen(F.cross_entropy, LOGITS, CLASSES.sort().values[[0] * 60])
    assert found.gain == pytest.approx(0.0, abs=1e-12) and found.error == pytest.approx(0.0, abs=1e-12)


def test_autocast_takes_no_digits_where_there_is_no_fp64(monkeypatch):
    monkeypatch.setattr("lightning_optkit.diagnostics.measure.associations.wide", lambda t: t.float())
    plain = seen(F.mse_loss, LOGITS, NUMBERS)
    with torch.autocast("cpu", torch.bfloat16):
        assert seen(F.mse_loss, LOGITS, NUMBERS) == plain


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: F.cross_entropy(x, y, torch.ones(3)),
        lambda x, y: F.cross_entropy(x, F.one_hot(y, 3).float()),
        lambda x, y: F.l1_loss(x[:, 0], y.float()),
        lambda x, y: F.mse_loss(x[:, 0], y.float()[:, None]),
        lambda x, y: F.mse_loss(x[:, 0].sum(), y.float().sum()),
        lambda x, y: (F.cross_entropy(x, y), F.cross_entropy(x, y)),
        lambda x, y: x.sum(),
    ],
)
def test_what_no_product_tells_is_unknown(loss):
    assert seen(loss, LOGITS, CLASSES) is None


def test_single_samples_have_no_other():
    assert seen(F.mse_loss, LOGITS, NUMBERS, batch=1) is None


def test_targets_that_are_told_in_another_way_depend_on_predictions_without_a_gain():
    # Predictions of another class each: no less loss with their own targets, but the class can be told.
    classes = torch.randint(0, 3, (600,), generator=GENERATOR)
    given = torch.zeros(600, 3)
    given[torch.arange(600), (classes + torch.randint(1, 3, (600,), generator=GENERATOR)) % 3] = 1.0
    given += 0.1 * torch.randn(600, 3, generator=GENERATOR)
    turned = given[:, [1, 2, 0]]
    for each in (given, turned):
        found = seen(F.cross_entropy, each, classes, batch=50).dependence
        assert found.deviates > 10 and found.strength == pytest.approx(0.5, abs=0.1)  # twice 1/4, by chance of 2 in 3
        assert found.free == 600 - 12 and found.columns == 3 * 2


@pytest.mark.parametrize("columns, samples, batch", [(1, 64, 64), (1, 200, 20), (3, 90, 30), (8, 400, 50)])
def test_deviates_of_independent_targets_are_those_of_a_normal_variable(columns, samples, batch):
    deviates, strengths = [], []
    for _ in range(200):
        given, target = (torch.randn(samples, columns, generator=GENERATOR) for _ in range(2))
        found = seen(F.mse_loss, given.exp(), target, batch=batch).dependence
        deviates.append(found.deviates)
        strengths.append(found.strength)
    deviates, error = torch.tensor(deviates), torch.tensor(strengths).std() / 14
    assert abs(float(deviates.mean())) < 0.25 and 0.75 < float(deviates.std()) < 1.2
    assert float((deviates > 3).float().mean()) < 0.02
    assert abs(float(torch.tensor(strengths).mean())) < 3.5 * float(error)


def test_dependence_is_unknown_of_few_samples_and_of_columns_that_change():
    assert seen(F.mse_loss, LOGITS[:8], NUMBERS[:8], batch=8).dependence is None
    called = CalledAssociations()
    for width in (2, 3):
        called.next_batch()
        with called:
            F.mse_loss(LOGITS[:, :width], NUMBERS[:, :width])
    assert called.seen() is not None and called.seen().dependence is None


def test_of_many_columns_some_are_taken():
    given = torch.randn(300, 100, generator=GENERATOR)
    found = seen(F.mse_loss, given, given + torch.randn(300, 100, generator=GENERATOR), batch=300).dependence
    assert found.columns == 25 * 25 and found.deviates > 30


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_numbers_that_are_not_finite_tell_nothing(value):
    given = LOGITS.double()
    given[0, 0] = value
    assert seen(F.mse_loss, given, NUMBERS.double()).dependence is None
