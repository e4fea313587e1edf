# SPDX-License-Identifier: Apache-2.0
"""CutMix against Algorithm A1 of the paper."""

import pytest
import torch

from lightning_optkit.data import CutMix


def solid(num, height, width):
    """Image i has the value i everywhere."""
    return torch.arange(float(num))[:, None, None, None].expand(num, 3, height, width).clone()


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("size", [(8, 8), (5, 9), (1, 6), (2, 1)])
def test_soft_targets_are_the_exact_share_of_pixels(seed, size):
    mixed, targets = CutMix(num_classes=6, generator=torch.Generator().manual_seed(seed))(
        solid(6, *size), torch.arange(6)
    )
    pixels = torch.stack([(mixed == label).float().mean(dim=(1, 2, 3)) for label in range(6)], dim=1)
    torch.testing.assert_close(targets, pixels)


def test_pasted_pixels_are_one_rectangle_at_the_same_place():
    x = torch.rand(4, 2, 16, 12, generator=torch.Generator().manual_seed(0))
    pasted_something = 0
    for seed in range(40):
        mixed, targets = CutMix(generator=torch.Generator().manual_seed(seed))(x, torch.eye(4))
        changed = (mixed != x).any(dim=0).any(dim=0)
        if not changed.any():
            continue
        pasted_something += 1
        rows, columns = changed.any(dim=1).nonzero(), changed.any(dim=0).nonzero()
        box = changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.all()
        for i in range(4):
            other = max(range(4), key=lambda j: targets[i, j] if j != i else -1.0)
            source = x[other] if targets[i, i] < 1 else x[i]
            assert torch.equal(mixed[i][:, changed], source[:, changed])
    assert pasted_something > 20


def test_areas_are_uniform_for_alpha_one_before_the_border_cuts_them():
    cut_mix = CutMix(1.0)
    boxes = cut_mix._boxes(4000, 1000, 1000)
    sides = boxes[:, 1::2] - boxes[:, ::2]
    inside = (sides[:, 0] == sides[:, 1]).float()
    expected = 1 / 6  # P(no cut) = E[(1 - s)^2], s = sqrt(U): 1 - 4/3 + 1/2
    assert float(inside.mean()) == pytest.approx(expected, abs=0.03)
    assert float((sides.prod(dim=1) / 1e6).mean()) == pytest.approx(expected_area(), abs=0.02)


def expected_area():
    """E[(share of a side inside)^2] by quadrature: side s = sqrt(u), center c uniform, cut at 0 and 1."""
    u, c = (
        (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000,
        (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000,
    )
    half = u.sqrt()[:, None] / 2
    return float(((c + half).clamp(max=1) - (c - half).clamp(min=0)).mean(dim=1).square().mean())


def test_class_indices_without_num_classes_are_refused():
    with pytest.raises(ValueError, match=r"CutMix\(num_classes=None\): class indices need num_classes"):
        CutMix()(torch.rand(2, 1, 3, 3), torch.tensor([0, 1]))


def test_wrong_alpha_is_refused():
    with pytest.raises(ValueError, match=r"CutMix\(alpha=-1.0\): alpha must be in \(0, inf\)"):
        CutMix(-1.0)
