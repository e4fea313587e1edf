# SPDX-License-Identifier: Apache-2.0
"""The contract of every augmentation."""

import copy
import io
import random

import pytest
import torch

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
)

MAKERS = {
    "Mixup": lambda **options: Mixup(1.0, num_classes=4, **options),
    "CutMix": lambda **options: CutMix(num_classes=4, **options),
    "MixupOrCutMix": lambda **options: MixupOrCutMix(num_classes=4, **options),
    "MixupOrCutMix element": lambda **options: MixupOrCutMix(num_classes=4, per="element", **options),
    "RandomErasing": lambda **options: RandomErasing(p=0.8, **options),
    "RandomErasing random": lambda **options: RandomErasing(p=0.8, value="random", **options),
    "RandomHorizontalFlip": RandomHorizontalFlip,
    "RandomVerticalFlip": RandomVerticalFlip,
    "RandomCrop": lambda **options: RandomCrop((6, 7), padding=2, **options),
    "RandomRotation": lambda **options: RandomRotation(45.0, interpolation="bilinear", **options),
    "GaussianNoise": GaussianNoise,
}
every_augmentation = pytest.mark.parametrize("name", MAKERS)


def make(name, **options):
    return MAKERS[name](**options)


def images(dtype=torch.float32):
    values = torch.rand(8, 3, 6, 7, generator=torch.Generator().manual_seed(0)) * 255
    return values.to(dtype)


def apply(augment, x):
    """The augmented images; for pair augmentations also the targets."""
    if isinstance(augment, Mixup | CutMix | MixupOrCutMix):
        return augment(x, torch.arange(8, device=x.device) % 4)
    return (augment(x),)


@every_augmentation
def test_evaluation_mode_is_the_identity(name):
    x = images()
    augment = make(name).eval()
    before = augment.draws.generator.get_state()
    results = apply(augment, x)
    assert results[0] is x
    assert len(results) == 1 or torch.equal(results[1], torch.arange(8) % 4)
    assert torch.equal(augment.draws.generator.get_state(), before)


@every_augmentation
def test_same_seed_same_images_other_seed_others(name):
    first, same, other = (apply(make(name, generator=torch.Generator().manual_seed(s)), images()) for s in (3, 3, 4))
    assert torch.equal(first[0], same[0]) and torch.equal(first[-1], same[-1])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], images())


@every_augmentation
def test_every_call_draws_anew(name):
    augment = make(name)
    first, second = apply(augment, images()), apply(augment, images())
    assert not torch.equal(first[0], second[0])


@every_augmentation
def test_global_generators_and_the_input_stay_as_they_are(name):
    torch_state, python_state, x = torch.get_rng_state(), random.getstate(), images()
    apply(make(name), x)
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert torch.equal(x, images())


@every_augmentation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_keeps_dtype_and_memory_format(name, dtype, memory_format):
    x = images(dtype).contiguous(memory_format=memory_format)
    if dtype == torch.uint8 and name.split()[0] in ("Mixup", "MixupOrCutMix", "GaussianNoise"):
        with pytest.raises(TypeError, match=rf"{name.split()[0]}\(\w+=torch.uint8\): \w+ must be"):
            apply(make(name), x)
        return
    result = apply(make(name), x)[0]
    assert result.dtype == dtype and result.shape == x.shape
    assert result.is_contiguous(memory_format=memory_format)


@every_augmentation
def test_layout_does_not_change_the_numbers(name):
    plain, channels_last = (
        apply(make(name), images().contiguous(memory_format=layout))
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    if name in ("GaussianNoise", "RandomErasing random"):  # noise is drawn in the order of memory
        assert (plain[0] != images()).float().mean() == (channels_last[0] != images()).float().mean()
    else:
        torch.testing.assert_close(plain[0], channels_last[0])


@every_augmentation
def test_never_reads_the_batch_back_from_its_device(name):
    x = images().to("meta")  # holds no numbers, so reading any would raise
    result = apply(make(name), x)[0]
    assert result.is_meta and result.shape == x.shape


@every_augmentation
def test_a_checkpoint_continues_the_draws(name):
    augment, file = make(name), io.BytesIO()
    apply(augment, images())
    torch.save(augment.state_dict(), file)
    file.seek(0)
    restored, copied = make(name), copy.deepcopy(augment)
    restored.load_state_dict(torch.load(file, weights_only=True))
    expected = apply(augment, images())[0]
    assert torch.equal(apply(restored, images())[0], expected)
    assert torch.equal(apply(copied, images())[0], expected)


@every_augmentation
def test_empty_batch_stays_empty(name):
    augment, x = make(name), images()[:0]
    pair = isinstance(augment, Mixup | CutMix | MixupOrCutMix)
    result = augment(x, torch.arange(0))[0] if pair else augment(x)
    assert result.shape == x.shape


@every_augmentation
def test_what_is_no_tensor_is_refused(name):
    augment = make(name)
    arguments = ([1.0], torch.tensor([0])) if isinstance(augment, Mixup | CutMix | MixupOrCutMix) else ([1.0],)
    with pytest.raises(TypeError, match=rf"{name.split()[0]}\(\w+=list\): \w+ must be a "):
        augment(*arguments)


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("Mixup", "GaussianNoise")])
def test_what_is_no_batch_of_images_is_refused(name):
    argument = "inputs" if "CutMix" in name else "images"
    message = rf"{name.split()[0]}\({argument}.shape=\(3, 6, 7\)\): {argument} must be \(N, C, H, W\)"
    with pytest.raises(ValueError, match=message):
        apply(make(name), images()[0])


def test_augmentations_chain_in_a_sequential():
    chain = torch.nn.Sequential(RandomHorizontalFlip(), RandomCrop(6, padding=1), RandomErasing(), GaussianNoise())
    assert chain(images()).shape == (8, 3, 6, 6)
