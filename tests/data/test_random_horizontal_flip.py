# SPDX-License-Identifier: Apache-2.0
"""RandomHorizontalFlip: each image mirrored or not, at the stated rate."""

import pytest
import torch

from lightning_optkit.data import RandomHorizontalFlip


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_mirrors_a_share_p_of_the_images_and_leaves_the_rest(p):
    x = torch.rand(4000, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    flipped = RandomHorizontalFlip(p)(x)
    changed = (flipped != x).flatten(1).any(dim=1)
    assert float(changed.float().mean()) == pytest.approx(p, abs=0.04)
    assert torch.equal(flipped[changed], x[changed].flip(-1)) and torch.equal(flipped[~changed], x[~changed])


def test_wrong_probability_is_refused():
    with pytest.raises(ValueError, match=r"RandomHorizontalFlip\(p=-0.1\): p must be in \[0, 1\]"):
        RandomHorizontalFlip(-0.1)
