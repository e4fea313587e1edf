# SPDX-License-Identifier: Apache-2.0
"""RandomCrop against slices of the images padded by numpy."""

from collections import Counter

import numpy as np
import pytest
import torch

from lightning_optkit.data import RandomCrop


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect"])
@pytest.mark.parametrize(("size", "padding"), [((3, 5), 0), ((4, 6), 2), ((8, 10), 3), ((1, 1), 1)])
def test_windows_are_slices_of_the_padded_image_at_every_place_alike(mode, size, padding):
    image = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0))
    constant = {"constant_values": 9.0} if mode == "constant" else {}
    padded = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (padding, padding), (padding, padding)), mode, **constant))
    places = [(i, j) for i in range(5 + 2 * padding - size[0] + 1) for j in range(7 + 2 * padding - size[1] + 1)]
    slices = {}
    for i, j in places:
        slices.setdefault(padded[:, i : i + size[0], j : j + size[1]].numpy().tobytes(), []).append((i, j))

    num = 400 * len(places)
    windows = RandomCrop(size, padding, fill=9.0, padding_mode=mode)(image.expand(num, 2, 5, 7))
    found = Counter(window.numpy().tobytes() for window in windows)
    assert set(found) == set(slices)  # every place occurs, and nothing else
    for window, here in slices.items():
        assert found[window] == pytest.approx(400 * len(here), abs=6 * (400 * len(here)) ** 0.5)


def test_one_number_is_a_square():
    assert RandomCrop(4)(torch.zeros(2, 1, 9, 8)).shape == (2, 1, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9, 0), r"RandomCrop\(size=\(9, 9\)\): must not exceed the padded image, 8 \+ 2 \* 0 pixels"),
        ((9, 8, "reflect"), r"RandomCrop\(padding=8\): 'reflect' needs less than the image's 8 pixels"),
        ((0, 0), r"RandomCrop\(size=0\): size must be an integer >= 1"),
        ((4, -1), r"RandomCrop\(padding=-1\): padding must be an integer >= 0"),
        ((4, 0, "wrap"), r"RandomCrop\(padding_mode='wrap'\): padding_mode must be one of"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomCrop(*arguments[:2], padding_mode=(*arguments, "constant")[2])(torch.zeros(1, 1, 8, 8))
