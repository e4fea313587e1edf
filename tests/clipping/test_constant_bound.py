# SPDX-License-Identifier: Apache-2.0
"""A clip whose bound never changes is not asked in every step; every other one is, subclasses included."""

import math
from dataclasses import dataclass

import pytest
import torch

from lightning_optkit.clipping import AutoClip, ClipNorm, ClipPerTensor, ClipUnitwise, ClipValue, ZClip
from lightning_optkit.optimizers import SGD


@dataclass(frozen=True)
class Halving(ClipNorm):
    """Bounds the norm by half of what it is."""

    def norm_bound(self, norm):
        return norm / 2


class Duck:
    """A clip without a base class."""

    needs_norm, bounds = True, ClipNorm(1.0).bounds

    def norm_bound(self, norm):
        return 1.0


@pytest.mark.parametrize(
    ("clip", "bound"),
    [(ClipNorm(2.0), 2.0), (ClipPerTensor(2.0), math.inf), (ClipUnitwise(0.1), math.inf)],
    ids=lambda value: str(value),
)
def test_a_constant_bound_is_that_of_the_norm(clip, bound):
    assert clip.constant_bound == clip.norm_bound(torch.tensor(5.0)) == bound


@pytest.mark.parametrize("clip", [AutoClip(), ZClip(), ClipValue(1.0), Halving(1.0)], ids=lambda c: type(c).__name__)
def test_other_clips_have_none(clip):
    assert clip.constant_bound is None


@pytest.mark.parametrize(
    ("clip", "moved"),
    [(Halving(1.0), 2.5), (Duck(), 1.0), (ClipNorm(1.0), 1.0)],
    ids=["subclass", "no base class", "constant"],
)
def test_the_step_asks_who_has_none(clip, moved):
    weight = torch.zeros(2, requires_grad=True)
    optimizer = SGD([weight], lr=1.0, clip=clip)
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert float(weight.detach().norm()) == pytest.approx(moved, rel=1e-5)


@pytest.mark.parametrize("is_recording", [True, False])
def test_the_step_leaves_the_grad_mode_alone(is_recording):
    weight = torch.zeros(2, requires_grad=True)
    optimizer = SGD([weight], lr=1.0)
    weight.grad = torch.ones(2)
    with torch.set_grad_enabled(is_recording):
        optimizer.step()
        assert torch.is_grad_enabled() == is_recording
        optimizer.param_groups[0]["lr"] = -1.0
        with pytest.raises(ValueError, match="lr"):
            optimizer.step()
        assert torch.is_grad_enabled() == is_recording
