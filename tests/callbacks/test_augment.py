# SPDX-License-Identifier: Apache-2.0
"""Augment in real Trainers: training batches only, seeded, resumable, with the loss mixed in an unchanged module."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import Augment, Fuse, LabelSmoothing, Preprocess
from lightning_optkit.data import (
    CutMix,
    GaussianNoise,
    Mixup,
    MixupOrCutMix,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomRotation,
    RandomVerticalFlip,
    Standardize,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*limit_val_batches=1.0.*"),
]

IMAGES = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
VALUES = torch.randn(8, 1, generator=torch.Generator().manual_seed(5))


def cross_entropy(logits, y):
    return F.cross_entropy(logits, y)


class Classifier(pl.LightningModule):
    """Records batches by stage, and the loss of every training step."""

    def __init__(self, loss=cross_entropy, configure=lambda module: torch.optim.SGD(module.parameters(), lr=0.1)):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
        self.loss, self.configure, self.seen, self.losses, self.logits = loss, configure, {}, [], []

    def training_step(self, batch, batch_idx):
        self.seen.setdefault("train", []).append(batch)
        self.logits.append(self.net(batch[0]))
        self.losses.append(self.loss(self.logits[-1], batch[1]))
        return self.losses[-1]

    def validation_step(self, batch, batch_idx):
        self.seen.setdefault("validate", []).append(batch)
        self.losses.append(F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.configure(self)


def loader(targets=LABELS, batch_size=2):
    return DataLoader(TensorDataset(IMAGES, targets), batch_size=batch_size)


@pytest.fixture
def run(make_trainer):
    """run(module, *callbacks, targets, val, ckpt_path, **trainer): the Trainer after the fit."""

    def run_(module, *callbacks, targets=LABELS, val=None, ckpt_path=None, batch_size=2, train=None, **kwargs):
        trainer = make_trainer(*callbacks, **{"epochs": 1, "limit_val_batches": 1.0, **kwargs})
        trainer.fit(module, train or loader(targets, batch_size), val, ckpt_path=ckpt_path)
        return trainer

    return run_


def images_of(module, stage="train"):
    return torch.cat([batch[0] for batch in module.seen[stage]])


EVERY = {
    "flips": lambda: [RandomHorizontalFlip(), RandomVerticalFlip()],
    "crop": lambda: RandomCrop(6, padding=2),
    "rotation": lambda: RandomRotation(30.0),
    "erasing": lambda: RandomErasing(p=1.0),
    "noise": lambda: GaussianNoise(),
    "mixup": lambda: Mixup(1.0),
    "cutmix": lambda: CutMix(),
}


@pytest.mark.parametrize("kind", EVERY)
def test_training_batches_only(run, kind):
    module = Classifier()
    run(module, Augment(EVERY[kind]()), val=loader(), num_sanity_val_steps=2, epochs=2)
    assert images_of(module).shape == (16, 1, 6, 6) and not torch.equal(images_of(module)[:8], IMAGES)
    assert not torch.equal(images_of(module)[:8], images_of(module)[8:])  # every epoch its own
    assert torch.equal(images_of(module, "validate"), torch.cat([IMAGES[:4], IMAGES, IMAGES]))
    assert all(
        torch.equal(batch[1], part) for batch, part in zip(module.seen["train"], LABELS.split(2) * 2, strict=True)
    )


def test_one_seed_one_result_and_the_global_generator_untouched(run):
    def train(seed):
        torch.manual_seed(9)
        module = Classifier()
        run(module, Augment([RandomErasing(), GaussianNoise(), Mixup()], seed=seed))
        return images_of(module), torch.rand(1)

    torch.manual_seed(9)
    run(Classifier())
    plain = torch.rand(1)
    first, after = train(0)
    assert torch.equal(first, train(0)[0]) and not torch.equal(first, train(1)[0]) and torch.equal(after, plain)


def test_two_augmentations_do_not_share_their_numbers(run):
    module = Classifier()
    run(module, Augment([GaussianNoise(), GaussianNoise()]), batch_size=8)
    alone = Classifier()
    run(alone, Augment([GaussianNoise()]), batch_size=8)
    first, both = alone.seen["train"][0][0] - IMAGES, module.seen["train"][0][0] - IMAGES
    assert not torch.allclose(both, 2 * first)


# --- the loss ---

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


@pytest.mark.parametrize("configure", [
    lambda module: torch.optim.AdamW(module.parameters(), lr=0.01),
    lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
])  # fmt: skip
def test_fused_and_plain_optimizers_see_the_same(run, configure):
    plain, fused = Classifier(configure=configure), Classifier(configure=configure)
    run(plain, Augment([RandomCrop(6, 1), Mixup()]), epochs=2)
    run(fused, Augment([RandomCrop(6, 1), Mixup()]), Fuse(verbose=False), epochs=2)
    torch.testing.assert_close(plain.net[1].weight, fused.net[1].weight)


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


def test_resumed_equals_uninterrupted(run, tmp_path, frozen):
    def train(epochs, ckpt_path=None):
        module = Classifier()
        callbacks = Preprocess(Standardize(feature_dim=1)), Augment([RandomErasing(value="random"), Mixup(), CutMix()])
        trainer = run(module, *callbacks, epochs=epochs, ckpt_path=ckpt_path)
        return trainer, frozen(module.net.state_dict())

    _, expected = train(3)
    trainer, _ = train(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trainer, resumed = train(3, tmp_path / "one.ckpt")
    assert resumed == expected
    torch.load(tmp_path / "one.ckpt", weights_only=True)


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*")
@pytest.mark.parametrize("steps", [1, 3])
def test_resumed_in_the_middle_of_an_epoch_with_exact_resume(run, tmp_path, frozen, steps):
    exact = pytest.importorskip("lightning_optkit.callbacks.exact_resume")

    def train(max_steps, ckpt_path=None):
        torch.manual_seed(6 if ckpt_path is None else 7)
        module = Classifier()
        callbacks = [Preprocess(Standardize(feature_dim=1)), Augment([RandomErasing(), Mixup()]), exact.ExactResume()]
        callbacks.append(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=steps, save_top_k=-1))
        shuffled = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=2, shuffle=True)
        arguments = dict(max_steps=max_steps, epochs=-1, ckpt_path=ckpt_path, enable_checkpointing=True)
        run(module, *callbacks, train=shuffled, **arguments)
        return frozen(module.net.state_dict())

    expected = train(5)
    assert train(5, tmp_path / f"step={steps}.ckpt") == expected


def test_a_second_fit_of_the_same_callback_starts_anew(run):
    augment, first, second = Augment(GaussianNoise()), Classifier(), Classifier()
    run(first, augment)
    run(second, augment)
    assert torch.equal(images_of(first), images_of(second))


# --- undone, and refused ---


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_trainer_and_module_are_as_before(make_trainer, fails):
    module = Classifier((lambda logits, y: 1 / 0) if fails else cross_entropy)
    trainer = make_trainer(Augment(Mixup()), Preprocess(Standardize(feature_dim=1)), epochs=1)
    if fails:
        with pytest.raises(ZeroDivisionError):
            trainer.fit(module, loader())
    else:
        trainer.fit(module, loader())
    assert "batch_to_device" not in vars(trainer.strategy) and "training_step" not in vars(module)


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


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Augment([]), ValueError, r"Augment\(augmentations=\[\]\): augmentations must hold at least one"),
        (
            lambda: Augment([torch.flip]),
            TypeError,
            r"Augment\(augmentations=.*\): augmentations must be an augmentation or",
        ),
        (lambda: Augment(Mixup(), inputs=0.5), TypeError, r"Augment\(inputs=0.5\): inputs must be a position, a name"),
        (lambda: Augment(Mixup(), targets=None), TypeError, r"Augment\(targets=None\): targets must be a position"),
        (lambda: Augment(Mixup(), targets=0), ValueError, r"Augment\(targets=0\): targets must be another field"),
        (lambda: Augment(Mixup(), seed=-1), ValueError, r"Augment\(seed=-1\): seed must be an integer >= 0"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (
            lambda: Augment(Mixup(), targets=2),
            r"Augment\(targets=2\): the batch must have this field; it is a list of 2",
        ),
        (lambda: Augment(Mixup(), inputs="x"), r"Augment\(inputs='x'\): the batch must have this field"),
        (
            lambda: Augment(RandomHorizontalFlip(), inputs=1),
            r"RandomHorizontalFlip\(images.shape=\(2,\)\): images must be",
        ),
    ],
)
def test_batches_that_do_not_fit_are_refused(run, augment, message):
    with pytest.raises(ValueError, match=message):
        run(Classifier(), augment())
