# SPDX-License-Identifier: Apache-2.0
"""resize against Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_optkit.data import resize

FILTERS = {"nearest": Image.NEAREST, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}


@pytest.mark.parametrize("size", [(20, 30), (80, 91), (11, 90)])
@pytest.mark.parametrize("interpolation", FILTERS)
def test_matches_pillow(interpolation, size):
    images = torch.rand(2, 1, 37, 53, generator=torch.Generator().manual_seed(0))
    resized = resize(images, size, interpolation=interpolation)
    for image, result in zip(images, resized, strict=True):
        expected = Image.fromarray(image[0].numpy()).resize(size[::-1], FILTERS[interpolation])
        np.testing.assert_allclose(result[0].numpy(), np.asarray(expected), rtol=0, atol=1e-5)


def test_bytes_match_pillow_to_one_level():
    images = torch.randint(0, 256, (1, 1, 30, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    resized = resize(images, (50, 13), interpolation="bicubic")
    expected = np.asarray(Image.fromarray(images[0, 0].numpy()).resize((13, 50), Image.BICUBIC)).astype(int)
    assert resized.dtype == torch.uint8 and np.abs(resized[0, 0].numpy().astype(int) - expected).max() <= 1


def test_without_antialias_samples_only_the_nearest_two():
    line = torch.arange(8.0).view(1, 1, 1, 8)
    assert resize(line, (1, 2), antialias=False).flatten().tolist() == [1.5, 5.5]
    assert resize(line**2, (1, 2), antialias=False).flatten().tolist() == [2.5, 30.5]


@pytest.mark.parametrize(("shape", "expected"), [((40, 60), (20, 30)), ((60, 40), (30, 20)), ((7, 10), (20, 28))])
def test_one_number_is_the_shorter_side(shape, expected):
    assert resize(torch.zeros(1, 2, *shape), 20).shape == (1, 2, *expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_keeps_dtype_memory_format_and_constants(dtype, memory_format):
    images = torch.full((2, 3, 9, 8), 7, dtype=dtype).contiguous(memory_format=memory_format)
    resized = resize(images, 5)
    assert resized.dtype == dtype and resized.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(resized, torch.full_like(resized, 7))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 4, 4), 2), r"resize\(images.shape=\(3, 4, 4\)\): images must be \(N, C, H, W\)"),
        ((torch.zeros(1, 3, 4, 4), 0), r"resize\(size=0\): size must be an integer >= 1"),
        ((torch.zeros(1, 3, 4, 4), (2, -1)), r"resize\(size=-1\): size must be an integer >= 1"),
    ],
)
def test_what_cannot_be_resized_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        resize(*arguments)


def test_unknown_interpolation_is_refused():
    with pytest.raises(ValueError, match=r"resize\(interpolation='area'\): interpolation must be one of 'nearest'"):
        resize(torch.zeros(1, 1, 2, 2), 1, interpolation="area")
