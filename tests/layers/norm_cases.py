# SPDX-License-Identifier: Apache-2.0
"""Runs one of our norms, torch's, and the fp64 formula on the same numbers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lightning_optkit.layers import (
    AddLayerNorm,
    AddRMSNorm,
    LayerNorm,
    RMSNorm,
    _dispatch,
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    rms_norm,
)

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


@dataclass(frozen=True)
class Norm:
    """One of our four layers and torch's counterpart. The name begins with "add" if there is a residual."""

    name: str
    module: type[nn.Module]
    function: Callable
    torch_module: type[nn.Module]
    torch_function: Callable
    has_bias: bool

    @property
    def adds(self):
        return self.name.startswith("add")

    @property
    def owner(self):
        """The beginning of its messages."""
        return self.module.__name__

    def inputs(self, x, residual=None):
        """What the layer takes; by default the residual adds nothing."""
        return (x, torch.zeros_like(x) if residual is None else residual) if self.adds else (x,)

    def parameters(self, numbers):
        return [numbers.weight, numbers.bias] if self.has_bias else [numbers.weight]

    def torch_forward(self, module, total):
        """torch's forward with the parameters of `module`, ours."""
        return self.torch_module.forward(module, total)


NORMS = {
    norm.name: norm
    for norm in (
        Norm("layer", LayerNorm, layer_norm, nn.LayerNorm, F.layer_norm, has_bias=True),
        Norm("rms", RMSNorm, rms_norm, nn.RMSNorm, F.rms_norm, has_bias=False),
        Norm("add_layer", AddLayerNorm, add_layer_norm, nn.LayerNorm, F.layer_norm, has_bias=True),
        Norm("add_rms", AddRMSNorm, add_rms_norm, nn.RMSNorm, F.rms_norm, has_bias=False),
    )
}


def never_small(patch):
    """No input is small enough for torch's kernel."""
    for name in ("SMALL_LAYER", "SMALL_RMS", "SMALL_ADD_LAYER", "SMALL_ADD_RMS"):
        patch.setattr(_dispatch, name, -1)


def run(kind, n, ours, stored=None):
    """Outputs, then gradients of what takes part. `stored`: dtype that torch would have rounded the sum to."""
    norm = NORMS[kind]
    n = Numbers(*(t.detach().clone().requires_grad_() for t in (n.x, n.residual, n.weight, n.bias)), n.dy, n.d_sum)
    parameters, size = norm.parameters(n), (n.x.shape[-1],)
    if not norm.adds:
        outputs = [(norm.function if ours else norm.torch_function)(n.x, size, *parameters, EPS)]
    elif ours:
        outputs = list(norm.function(n.x, n.residual, size, *parameters, EPS))
    else:
        total = n.x + n.residual
        if stored is not None:
            total = total + (total.to(stored).to(total.dtype) - total).detach()
        outputs = [norm.torch_function(total, size, *parameters, EPS), total]
    inputs = [*norm.inputs(n.x, n.residual), *parameters]
    found = torch.autograd.grad(outputs, inputs, [n.dy, n.d_sum][: len(outputs)])
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
