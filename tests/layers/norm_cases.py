# SPDX-License-Identifier: Apache-2.0
"""Runs a norm of ours, torch's, and the fp64 formula on the same numbers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lightning_optkit.layers import add_layer_norm, add_rms_norm, layer_norm, rms_norm

EPS = 1e-5
SHAPES = [(1, 1), (7, 3), (130, 1), (33, 16), (17, 31), (18, 32), (40, 33), (128, 64), (31, 255), (16, 1024), (3, 5000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@dataclass
class Numbers:
    """One case: inputs and the gradients that come in."""

    x: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    dy: torch.Tensor
    d_sum: torch.Tensor

    def to(self, dtype, parameters=None):
        parameters = parameters or dtype
        return Numbers(
            self.x.to(dtype),
            self.residual.to(dtype),
            self.weight.to(parameters),
            self.bias.to(parameters),
            self.dy.to(dtype),
            self.d_sum.to(dtype),
        )


def numbers(rows, size, seed=0, scale=2.0, offset=0.5):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Numbers(
        normal(rows, size) * scale + offset,
        normal(rows, size),
        normal(size),
        normal(size),
        normal(rows, size),
        normal(rows, size),
    )


def leaves(n):
    return [t.detach().clone().requires_grad_() for t in (n.x, n.residual, n.weight, n.bias)]


def run(kind, n, ours, stored=None):
    """Outputs, then gradients of what takes part. `stored`: dtype that torch would have rounded the sum to."""
    x, residual, weight, bias = leaves(n)
    size = (x.shape[-1],)
    if kind == "layer":
        outputs = [(layer_norm if ours else F.layer_norm)(x, size, weight, bias, EPS)]
        inputs, grads = [x, weight, bias], [n.dy]
    elif kind == "rms":
        outputs = [(rms_norm if ours else F.rms_norm)(x, size, weight, EPS)]
        inputs, grads = [x, weight], [n.dy]
    else:
        centered = kind == "add_layer"
        inputs = [x, residual, weight, *([bias] if centered else [])]
        if ours and centered:
            outputs = list(add_layer_norm(x, residual, size, weight, bias, EPS))
        elif ours:
            outputs = list(add_rms_norm(x, residual, size, weight, EPS))
        else:
            total = x + residual
            if stored is not None:
                total = total + (total.to(stored).to(total.dtype) - total).detach()
            norm = F.layer_norm(total, size, weight, bias, EPS) if centered else F.rms_norm(total, size, weight, EPS)
            outputs = [norm, total]
        grads = [n.dy, n.d_sum]
    found = torch.autograd.grad(outputs, inputs, grads)
    return [t.detach() for t in [*outputs, *found]]


def error(found, exact):
    return (found.double() - exact).abs().max().item()


def check_against_fp64(kind, n, dtype, parameters=None):
    """Our error is at most torch's, or a few roundings of the largest number where torch's happens to be smaller."""
    low = n.to(dtype, parameters)
    exact = run(kind, low.to(torch.float64), ours=False, stored=dtype)
    theirs = run(kind, low, ours=False)
    ours = run(kind, low, ours=True)
    for k, (o, t, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert o.dtype == t.dtype and o.shape == t.shape
        # Where torch's error happens to be smaller: a few roundings of the largest number.
        slack = 4 * torch.finfo(o.dtype).eps * max(1.0, e.abs().max().item())
        if low.x.shape[-1] <= 3:  # nearly equal numbers: rounding is stretched by 1 / deviation, which eps bounds
            slack *= 2 / EPS**0.5
        if dtype == torch.float64:  # torch is the reference itself
            slack *= 100
        assert error(o, e) <= 1.01 * error(t, e) + slack, (kind, k, dtype, tuple(n.x.shape))
