# SPDX-License-Identifier: Apache-2.0
"""ClipValue in the step, against torch.nn.utils.clip_grad_value_ before a step of torch.optim."""

import math

import pytest
import torch

from lightning_optkit.clipping import ClipValue
from lightning_optkit.optimizers import SGD, AdamW

PATHS = pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])


@PATHS
@pytest.mark.parametrize(
    ("ours_class", "_torch_class", "kwargs"),
    [
        (SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.1)),
        (AdamW, torch.optim.AdamW, dict(lr=0.1, maximize=True)),
    ],
    ids=["sgd", "adamw"],
)
def test_folded_it_is_torchs_clip_and_step(ours_class, _torch_class, kwargs, fused):
    torch.manual_seed(0)
    ours = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((), (5, 7), (16411,))]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optimizers = [ours_class(ours, clip=ClipValue(0.7), fused=fused, **kwargs), _torch_class(theirs, **kwargs)]
    for size in (1.0, 1e-3, 1e30, 0.0):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = size * torch.randn(p.shape, dtype=torch.float64)
            q.grad = p.grad.clone()
        torch.nn.utils.clip_grad_value_(theirs, 0.7)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_infinities_are_clipped_and_nan_stays_as_in_torch(dtype, fused):
    p = torch.zeros(4, dtype=dtype, requires_grad=True)
    p.grad = torch.tensor([math.inf, -math.inf, math.nan, 0.25], dtype=dtype)
    SGD([p], lr=1.0, clip=ClipValue(0.5), fused=fused).step()
    assert p[[0, 1, 3]].tolist() == [-0.5, 0.5, -0.25]
    assert p[2].isnan()


def test_asks_for_no_norm():
    p = torch.ones(1, requires_grad=True)
    p.grad = torch.ones(1)
    optimizer = SGD([p], clip=ClipValue(0.5))
    optimizer.step()
    assert not ClipValue(0.5).needs_norm
    assert optimizer.grad_norm is None
    assert optimizer.grad_norm_clipped is None
    assert ClipValue(0.5).norm_bound(torch.tensor(1e9)) == math.inf


def test_called_it_is_torchs_function():
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.tensor([0.1, -3.0, 2.0])
    assert ClipValue(0.5)([p]) is None
    assert p.grad.tolist() == pytest.approx([0.1, -0.5, 0.5])


@pytest.mark.parametrize("max_value", [0.0, -1.0, math.inf, math.nan])
def test_refuses_a_value_out_of_range(max_value):
    with pytest.raises(ValueError, match=r"^ClipValue\(max_value=.*\): max_value must be in \(0, inf\)\.$"):
        ClipValue(max_value)
