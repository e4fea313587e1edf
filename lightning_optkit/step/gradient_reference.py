# SPDX-License-Identifier: Apache-2.0
"""What a step does to a gradient before its rule sees it, in plain PyTorch: norm, scale, clips and centralization."""

import math

import torch
from torch import Tensor

from lightning_optkit.step.coefficients import clip_coefficient
from lightning_optkit.step.lockstep import Asking
from lightning_optkit.step.numbers import GroupNumbers
from lightning_optkit.step.statistics import Clipped

__all__ = ["as_real", "clip_reference", "dense", "norm_reference"]


def norm_reference(grad: Tensor) -> tuple[float, float]:
    """Sum of squares of the finite elements, in double, and number of non-finite elements."""
    grad = as_real(dense(grad)).double()
    finite = torch.isfinite(grad)
    squares = torch.where(finite, grad, 0.0).square().sum()
    return float(squares), float((~finite).sum())


def dense(grad: Tensor) -> Tensor:
    """A sparse gradient as a dense one; any other unchanged."""
    return grad.to_dense() if grad.layout != torch.strided else grad


def as_real(t: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, as in torch.optim; any other unchanged."""
    return torch.view_as_real(t.resolve_conj()) if torch.is_complex(t) else t


def clip_reference(
    grad: Tensor,
    param: Tensor,
    grad_scale: float,
    numbers: GroupNumbers,
    *,
    is_vector: bool,
    is_shard: bool = False,
) -> Asking[tuple[Tensor, Clipped]]:
    """The gradient after scaling, every clip and centralization, and the result of clipping by tensor or by unit.

    Args:
        grad: Gradient with the shape of `param`; not written to.
        param: The parameter, for clipping by unit.
        grad_scale: Factor for the gradient: 1 / loss scale x clip coefficient.
        numbers: The numbers of its group.
        is_vector: Whether it is a single unit, which is not centralized.
        is_shard: Whether other processes have the other rows of the tensor.
    """
    clipped = Clipped(0.0, 0.0)
    factor = torch.ones((), dtype=torch.float64, device=grad.device)
    if math.isfinite(numbers.clip_tensor_norm):
        squares = (yield grad.double().square().sum().reshape(1))[0]
        factor = clip_coefficient(numbers.clip_tensor_norm, grad_scale * squares.sqrt())
        clipped = Clipped(float(factor.square() * squares), float(factor < 1))
    inner = list(range(grad.ndim)) if is_vector else list(range(1, grad.ndim))
    if math.isfinite(numbers.clip_unit_ratio):
        unit_sq = grad.double().square().sum(inner, keepdim=True)
        param_sq = param.double().square().sum(inner, keepdim=True)
        if is_vector:
            unit_sq, param_sq = (yield torch.stack([unit_sq.sum(), param_sq.sum()])).to(grad.device).unbind()
        grad_norm = abs(grad_scale) * unit_sq.sqrt()
        bound = numbers.clip_unit_ratio * param_sq.sqrt().clamp(min=numbers.clip_unit_eps)
        factor = torch.where(grad_norm > bound, bound / grad_norm, 1.0)
        sums = torch.stack([(factor.square() * unit_sq).sum(), (factor < 1).sum()])
        if is_shard and not is_vector:
            sums = yield sums
        clipped = Clipped(*sums.tolist())
    signed_scale = -grad_scale if numbers.maximize else grad_scale
    grad = grad * (signed_scale * factor).to(grad.dtype)
    if math.isfinite(numbers.clip_value):
        grad = grad.clamp(-numbers.clip_value, numbers.clip_value)
    if numbers.centralize and not is_vector and grad.numel() > 0:
        grad = grad - grad.double().mean(inner, keepdim=True).to(grad.dtype)
    return grad, clipped
