# SPDX-License-Identifier: Apache-2.0
"""The same run twice: a clip in our step, and the same clip called before a step of torch.optim."""

import copy

import pytest
import torch

from lightning_optkit.optimizers import SGD, AdamW

SHAPES = [(), (5, 7), (3, 2, 4), (16411,), (40, 500), (0, 3)]
RULES = {
    "sgd": (SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.1)),
    "adamw": (AdamW, torch.optim.AdamW, dict(lr=0.1, maximize=True)),
}


@pytest.fixture(params=[None, False], ids=["compiled", "reference"])
def fused(request):
    return request.param


@pytest.fixture(params=list(RULES))
def folded_and_called(request, fused):
    """Returns (our parameters, our optimizer, parameters of torch, norms before clipping)."""
    ours_class, _torch_class, kwargs = RULES[request.param]

    def run(clip, sizes, seed=0, shapes=SHAPES, dtype=torch.float64):
        torch.manual_seed(seed)
        ours = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
        theirs = [p.detach().double().clone().requires_grad_() for p in ours]
        optimizer = ours_class(ours, clip=copy.deepcopy(clip), fused=fused, **kwargs)
        reference = _torch_class(theirs, **kwargs)
        norms = []
        for size in sizes:
            for p, q in zip(ours, theirs, strict=True):
                p.grad = (size * torch.randn(p.shape, dtype=torch.float64)).to(dtype)
                q.grad = p.grad.double().clone()
            norms.append(float(clip(theirs)))
            norm_clipped = float(torch.nn.utils.get_total_norm([q.grad for q in theirs]))
            reference.step()
            optimizer.step()
            assert optimizer.grad_norm == pytest.approx(norms[-1], rel=1e-6)
            assert optimizer.grad_norm_clipped == pytest.approx(norm_clipped, rel=1e-6)
        return ours, optimizer, theirs, norms

    return run


@pytest.fixture
def sizes_after(fused):
    """sizes_after(clip, sizes, scale, rel): the sizes of gradients after clipping, and the optimizer that clipped.

    The gradients are `sizes` times `scale`, and the result is divided by it. Called, the clip gives the same, to `rel`.
    """

    def clipped(clip, sizes, scale, rel):
        alone = copy.deepcopy(clip)
        folded, called = (torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
        optimizer, moved = SGD([folded], lr=1.0, clip=clip, fused=fused), []
        for size in sizes:
            folded.grad, called.grad = (torch.full((1,), size * scale, dtype=torch.float64) for _ in range(2))
            before = folded.item()
            optimizer.step()
            alone([called])
            moved.append((before - folded.item()) / scale)
            assert called.grad.item() / scale == pytest.approx(moved[-1], rel=rel)
        return moved, optimizer

    return clipped
