# SPDX-License-Identifier: Apache-2.0
"""RandomRotation against scipy's rotation and exact quarter turns."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from lightning_optkit.data import RandomRotation


def images(num=1):
    return torch.rand(num, 2, 9, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("degrees", [-77.0, 10.0, 30.0, 135.0])
def test_bilinear_matches_scipy(degrees):
    rotated = RandomRotation((degrees, degrees), interpolation="bilinear", fill=0.3)(images())[0]
    for channel, image in zip(rotated, images()[0], strict=True):
        expected = ndimage.rotate(image.numpy(), degrees, reshape=False, order=1, mode="grid-constant", cval=0.3)
        np.testing.assert_allclose(channel.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("quarters", [-1, 1, 2])
def test_quarter_turns_of_squares_are_exact(dtype, interpolation, quarters):
    square = (torch.rand(3, 2, 7, 7, generator=torch.Generator().manual_seed(0)) * 255).round().to(dtype)
    rotated = RandomRotation((90.0 * quarters, 90.0 * quarters), interpolation=interpolation)(square)
    torch.testing.assert_close(rotated, torch.rot90(square, quarters, (2, 3)), rtol=1e-4, atol=1e-3)


def test_angles_are_uniform_and_differ_between_images():
    line = torch.zeros(3000, 1, 33, 33)
    line[:, :, 16, 16:] = 1.0  # points to the right of the center
    rotated = RandomRotation(60.0, interpolation="bilinear")(line)[:, 0]
    offset = torch.arange(33.0) - 16
    angle = torch.atan2(-(rotated.sum(dim=2) * offset).sum(dim=1), (rotated.sum(dim=1) * offset).sum(dim=1)).rad2deg()
    quartiles = angle.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(quartiles, torch.tensor([-60.0, -30.0, 0.0, 30.0, 60.0]), rtol=0, atol=4.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degrees": -5.0}, r"RandomRotation\(degrees=-5.0\): degrees must be in \[0, inf\)"),
        ({"degrees": (5.0, 1.0)}, r"RandomRotation\(degrees=\(5.0, 1.0\)\): the first end must not exceed"),
        ({"degrees": 5.0, "interpolation": "cubic"}, r"RandomRotation\(interpolation='cubic'\): interpolation must be"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RandomRotation(**options)
