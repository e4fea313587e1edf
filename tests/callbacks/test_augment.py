# SPDX-License-Identifier: Apache-2.0
"""Augment in real Trainers: training batches only, seeded, resumable, undone after the fit."""

import pytest
import torch
from augment_cases import IMAGES, LABELS, Classifier, cross_entropy, loader, running
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import Augment, Fuse, Preprocess
from lightning_optkit.data import (
    CutMix,
    GaussianNoise,
    Mixup,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomRotation,
    RandomVerticalFlip,
    Standardize,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")

run = pytest.fixture(running)


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


@pytest.mark.parametrize("configure", [
    lambda module: torch.optim.AdamW(module.parameters(), lr=0.01),
    lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
])  # fmt: skip
def test_fused_and_plain_optimizers_see_the_same(run, configure):
    plain, fused = Classifier(configure=configure), Classifier(configure=configure)
    run(plain, Augment([RandomCrop(6, 1), Mixup()]), epochs=2)
    run(fused, Augment([RandomCrop(6, 1), Mixup()]), Fuse(verbose=False), epochs=2)
    torch.testing.assert_close(plain.net[1].weight, fused.net[1].weight)


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
