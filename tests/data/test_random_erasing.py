# SPDX-License-Identifier: Apache-2.0
"""RandomErasing: rectangles of the stated area and shape, at the stated rate."""

import pytest
import torch

from lightning_optkit.data import RandomErasing


def boxes(erased):
    """Height and width of the zeros of each image of ones, after checking that they fill a rectangle."""
    sizes = []
    for hole in (erased == 0).all(dim=1):
        if hole.any():
            rows, columns = hole.any(dim=1).nonzero(), hole.any(dim=0).nonzero()
            height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
            assert hole.sum() == height * width
            sizes.append((height, width))
    return torch.tensor(sizes, dtype=torch.float64)


def test_rectangles_have_areas_and_ratios_in_their_ranges():
    sizes = boxes(RandomErasing(p=1.0, scale=(0.1, 0.3), ratio=(0.5, 2.0))(torch.ones(500, 2, 100, 100)))
    area, ratio = sizes.prod(dim=1) / 1e4, sizes[:, 0] / sizes[:, 1]
    assert len(sizes) == 500
    assert 0.09 < area.min() < 0.12 and 0.28 < area.max() < 0.31
    assert 0.48 < ratio.min() < 0.55 and 1.8 < ratio.max() < 2.1
    assert float(area.mean()) == pytest.approx(0.2, abs=0.01)
    assert float(ratio.log().mean()) == pytest.approx(0.0, abs=0.06)


def test_ratio_is_height_by_width():
    sizes = boxes(RandomErasing(p=1.0, scale=(0.04, 0.04), ratio=(4.0, 4.0))(torch.ones(3, 1, 100, 200)))
    torch.testing.assert_close(sizes[:, 0] / sizes[:, 1], torch.full((3,), 4.0, dtype=torch.float64), rtol=0.02, atol=0)


def test_places_are_uniform():
    holes = RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0))(torch.ones(6000, 1, 4, 4)) == 0
    counts = holes[:, 0, :3, :3].float()  # a 2 x 2 hole has 9 places
    corners = torch.stack([holes[:, 0, i, j] for i in (0, 3) for j in (0, 3)]).float().mean(dim=1)
    torch.testing.assert_close(corners, torch.full((4,), 1 / 9), rtol=0, atol=0.02)
    assert float(counts[:, 1, 1].mean()) == pytest.approx(4 / 9, abs=0.03)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_changes_a_share_p_of_the_images(p):
    erased = RandomErasing(p=p)(torch.ones(4000, 1, 16, 16))
    assert float((erased == 0).any(dim=(2, 3)).float().mean()) == pytest.approx(p, abs=0.04)


def test_images_in_which_no_rectangle_fits_stay():
    x = torch.ones(10, 1, 2, 50)
    assert torch.equal(RandomErasing(p=1.0, scale=(0.9, 0.9), ratio=(1.0, 1.0))(x), x)


def test_constant_value_and_noise_replace_the_pixels():
    options = {"p": 1.0, "scale": (0.25, 0.25), "ratio": (1.0, 1.0)}
    x = torch.full((20, 3, 40, 40), 9.0)
    constant, noisy = RandomErasing(**options, value=-2.0)(x), RandomErasing(**options, value="random")(x)
    hole = constant == -2
    assert hole.float().mean() == 0.25 and (constant[~hole] == 9).all()
    assert torch.equal(noisy != 9, hole)
    assert float(noisy[hole].mean()) == pytest.approx(0, abs=0.03) and float(noisy[hole].std()) == pytest.approx(
        1, abs=0.03
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.5}, r"RandomErasing\(p=1.5\): p must be in \[0, 1\]"),
        ({"scale": (0.3, 0.1)}, r"RandomErasing\(scale=\(0.3, 0.1\)\): the first end must not exceed the second"),
        ({"scale": (0.0, 0.1)}, r"RandomErasing\(scale=0.0\): scale must be in \(0, 1\]"),
        ({"ratio": (0.0, 1.0)}, r"RandomErasing\(ratio=0.0\): ratio must be in \(0, inf\)"),
        ({"value": "mean"}, r"RandomErasing\(value='mean'\): value must be a number or 'random'"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RandomErasing(**options)
