# SPDX-License-Identifier: Apache-2.0
"""truncated_normal against torch.nn.init, bit for bit."""

import pytest
import torch
from torch import nn

from lightning_optkit.init import truncated_normal


@pytest.mark.parametrize(("std", "bound"), [(0.02, 2.0), (1.0, 0.5), (3.0, 4.0)])
@pytest.mark.parametrize("shape", [(7,), (6, 4, 3, 3)], ids=str)
def test_equals_torch(shape, std, bound):
    reference = torch.empty(shape)
    nn.init.trunc_normal_(reference, 0, std, -bound * std, bound * std, generator=torch.Generator().manual_seed(3))
    ours = truncated_normal(torch.empty(shape), std=std, bound=bound, generator=torch.Generator().manual_seed(3))
    assert torch.equal(ours, reference)


def test_spread_after_the_cut_is_what_the_docstring_says():
    weight = truncated_normal(torch.empty(300, 300), std=1.0, generator=torch.Generator().manual_seed(0))
    assert weight.abs().max() <= 2
    assert weight.std() == pytest.approx(0.88, abs=0.01)  # 90 000 samples: standard error 0.002


@pytest.mark.parametrize("argument", ["std", "bound"])
def test_rejects_zero(argument):
    with pytest.raises(ValueError, match=rf"truncated_normal\({argument}=0\): {argument} must be in \(0, inf\)\."):
        truncated_normal(torch.empty(3), **{argument: 0})


def test_rejects_an_empty_tensor():
    with pytest.raises(
        ValueError, match=r"truncated_normal\(tensor of shape \(0,\)\): tensor must have at least one elem"
    ):
        truncated_normal(torch.empty(0))
