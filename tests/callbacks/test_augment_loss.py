# SPDX-License-Identifier: Apache-2.0
"""Augment mixes the loss of an unchanged module, with weights, ignored targets and smoothing, or refuses it."""

import pytest
import torch
import torch.nn.functional as F
from augment_cases import IMAGES, LABELS, Classifier, cross_entropy, loader, running
from torch import nn

from lightning_optkit.callbacks import Augment, LabelSmoothing
from lightning_optkit.data import CutMix, Mixup, MixupOrCutMix, RandomHorizontalFlip

pytestmark = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")

run = pytest.fixture(running)

VALUES = torch.randn(8, 1, generator=torch.Generator().manual_seed(5))
WEIGHT = torch.tensor([1.0, 2.0, 0.5])
LOSSES = {
    "functional": cross_entropy,
    "module": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "nll": lambda logits, y: F.nll_loss(logits.log_softmax(dim=1), y),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2),
}


@pytest.fixture
def mixtures(monkeypatch):
    """(partners, share) of every mixed batch."""
    drawn = []
    for kind in (Mixup, CutMix, MixupOrCutMix):
        original = kind.mix

        def mix(self, inputs, original=original):
            mixed, partners, share = original(self, inputs)
            drawn.append((partners, share))
            return mixed, partners, share

        monkeypatch.setattr(kind, "mix", mix)
    return drawn


@pytest.mark.parametrize("mixing", [Mixup, CutMix])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_is_cross_entropy_with_soft_targets(run, mixtures, kind, mixing):
    module = Classifier(LOSSES[kind])
    run(module, Augment(mixing(1.0)))
    assert len(mixtures) == 4
    for logits, loss, labels, (partners, share) in zip(
        module.logits, module.losses, LABELS.split(2), mixtures, strict=True
    ):
        soft = share * F.one_hot(labels, 3) + (1 - share) * F.one_hot(labels[partners], 3)
        expected = F.cross_entropy(
            logits, soft.float(), reduction="sum" if kind == "sum" else "mean",
            label_smoothing=0.2 if kind == "smoothed" else 0.0,
        )  # fmt: skip
        torch.testing.assert_close(loss, expected)


def test_class_weights_and_ignored_targets_are_those_of_each_pair(run, mixtures):
    targets = LABELS.clone()
    targets[1] = -100
    module = Classifier(nn.CrossEntropyLoss(weight=WEIGHT))
    run(module, Augment(Mixup(1.0)), targets=targets, batch_size=8)
    partners, share = mixtures[0]
    ours, theirs = (F.cross_entropy(module.logits[0], y, weight=WEIGHT) for y in (targets, targets[partners]))
    torch.testing.assert_close(module.losses[0], share * ours + (1 - share) * theirs)


def soft_targets(labels, partners, share, smoothing=0.0):
    """Every example's own targets, smoothed; in fp64."""
    share = torch.as_tensor(share, dtype=torch.float64).expand(len(labels))[:, None]
    soft = share * F.one_hot(labels, 3) + (1 - share) * F.one_hot(labels[partners], 3)
    return soft * (1 - smoothing) + smoothing / 3


@pytest.mark.parametrize("per", ["batch", "element", "pair"])
@pytest.mark.parametrize("kind", [name for name in LOSSES if name != "smoothed"])
@pytest.mark.parametrize("mixing", [Mixup, CutMix, MixupOrCutMix])
def test_the_loss_of_every_mixture_is_cross_entropy_with_its_soft_targets(run, mixtures, mixing, kind, per):
    module = Classifier(LOSSES[kind])
    run(module, Augment(mixing(per=per, p=0.8, label_smoothing=0.1)), batch_size=4)
    for logits, loss, labels, drawn in zip(module.logits, module.losses, LABELS.split(4), mixtures, strict=True):
        soft = soft_targets(labels, *drawn, smoothing=0.1)
        expected = F.cross_entropy(logits.double(), soft, reduction="sum" if kind == "sum" else "mean")
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_weights_and_ignored_targets_of_every_element(run, mixtures):
    """Half of the pair's loss is divided by the weights of its own targets, as cross_entropy divides a mean."""
    class_weights = torch.tensor([1.0, 3.0, 0.5])
    targets = LABELS.clone()
    targets[1] = -100
    module = Classifier(nn.CrossEntropyLoss(weight=class_weights))
    run(module, Augment(Mixup(1.0, per="element")), targets=targets, batch_size=8)
    partners, share = mixtures[0]
    expected = 0.0
    for y, part in ((targets, share), (targets[partners], 1 - share)):
        is_counted = y != -100
        weight = torch.where(is_counted, class_weights[y.clamp(min=0)], 0.0)
        log_p = module.logits[0].log_softmax(1).gather(1, y.clamp(min=0)[:, None])[:, 0]
        expected += -(part * weight * log_p).sum() / weight.sum()
    torch.testing.assert_close(module.losses[0], expected.to(torch.float32))


def test_a_loss_without_reduction_keeps_its_examples(run, mixtures):
    kept = []
    loss = lambda logits, y: kept.append(F.cross_entropy(logits, y, reduction="none")) or kept[-1].mean()  # noqa: E731
    module = Classifier(loss)
    run(module, Augment(MixupOrCutMix(per="element")), batch_size=8)
    soft = soft_targets(LABELS, *mixtures[0])
    expected = F.cross_entropy(module.logits[0].double(), soft, reduction="none")
    torch.testing.assert_close(kept[0].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per", ["batch", "element"])
def test_labels_of_their_own_are_mixed_and_smoothed_in_the_batch(run, mixtures, per):
    labels = (torch.rand(8, 3, generator=torch.Generator().manual_seed(4)) > 0.5).float()
    module = Classifier(F.binary_cross_entropy_with_logits)
    augment = Augment(CutMix(per=per, multi_label=True, label_smoothing=0.2))
    run(module, augment, targets=labels, batch_size=8)
    partners, share = mixtures[0]
    share = torch.as_tensor(share).expand(8)[:, None]
    expected = (share * labels + (1 - share) * labels[partners]) * 0.8 + 0.1
    torch.testing.assert_close(module.seen["train"][0][1].double(), expected.double(), rtol=1e-6, atol=1e-6)


def test_a_loss_that_smooths_too_is_refused(run):
    with pytest.raises(ValueError, match=r"Mixup\(label_smoothing=0.1\): the module smooths already, by cross_entropy"):
        run(Classifier(LOSSES["smoothed"]), Augment(Mixup(label_smoothing=0.1)))


def test_label_smoothing_beside_it_smooths_the_mixed_targets(run, mixtures):
    module = Classifier()
    run(module, Augment(Mixup(1.0)), LabelSmoothing(0.3))
    partners, share = mixtures[0]
    labels = LABELS[:2]
    soft = share * F.one_hot(labels, 3) + (1 - share) * F.one_hot(labels[partners], 3)
    torch.testing.assert_close(module.losses[0], F.cross_entropy(module.logits[0], soft, label_smoothing=0.3))


def test_floating_targets_are_mixed_in_the_batch(run, mixtures):
    module = Classifier(lambda prediction, y: F.mse_loss(prediction[:, :1], y))
    run(module, Augment(Mixup(1.0)), targets=VALUES)
    for batch, y, (partners, share) in zip(module.seen["train"], VALUES.split(2), mixtures, strict=True):
        torch.testing.assert_close(batch[1], share * y + (1 - share) * y[partners])


def test_of_several_that_mix_one_is_drawn_per_batch(run, mixtures):
    run(Classifier(), Augment([Mixup(), CutMix(), Mixup(2.0)]), epochs=6)
    assert len(mixtures) == 6 * 4


def test_validation_loss_is_not_mixed(run):
    module = Classifier()
    run(module, Augment(Mixup(1.0)), val=loader(batch_size=8), num_sanity_val_steps=0)
    with torch.no_grad():
        torch.testing.assert_close(module.losses[-1], F.cross_entropy(module.net(IMAGES), LABELS))


def test_every_step_sees_the_mean_of_its_two_mixed_losses(run, mixtures):
    """accumulate_grad_batches=2, four batches: two steps."""
    module, expected = Classifier(), Classifier()
    run(module, Augment(Mixup(1.0)))
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        for index in (2 * step, 2 * step + 1):
            (partners, share), labels = mixtures[index], LABELS.split(2)[index]
            logits = expected.net(module.seen["train"][index][0])
            soft = share * F.one_hot(labels, 3) + (1 - share) * F.one_hot(labels[partners], 3)
            (F.cross_entropy(logits, soft) / 2).backward()
        optimizer.step()
    torch.testing.assert_close(module.net[1].weight, expected.net[1].weight)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda logits, y: -logits.log_softmax(1).gather(1, y[:, None]).mean(),
            r"Augment\(\): training_step returned a loss",
        ),
        (
            lambda logits, y: F.mse_loss(logits, F.one_hot(y, 3).float()),
            r"Augment\(\): needs a classification loss; trai",
        ),
        (
            lambda logits, y: F.cross_entropy(logits[:1], y[:1]),
            r"Augment\(targets=1\): cross_entropy was given 1 targets",
        ),
    ],
    ids=["own", "regression", "part of the batch"],
)
def test_a_loss_that_cannot_be_reached_is_an_error_never_silence(run, loss, message):
    with pytest.raises(RuntimeError, match=message):
        run(Classifier(loss), Augment(Mixup()))


def test_without_mixing_any_loss_will_do(run):
    run(Classifier(lambda logits, y: logits.square().mean()), Augment(RandomHorizontalFlip()))
