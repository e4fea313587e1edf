# SPDX-License-Identifier: Apache-2.0
"""Clips the gradient of each output unit relative to the unit's weights: adaptive gradient clipping.

Source: Brock et al. 2021, "High-performance large-scale image recognition without normalization", arXiv:2102.06171,
section 4.1, equation 3.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optkit._checks import check_in, check_tensors
from lightning_optkit._norms import each_norm, norm
from lightning_optkit._torch_private import sparse_indices, sparse_values
from lightning_optkit.clipping._gradients import gradients, norm_of
from lightning_optkit.step import Clip, ClipBounds
from lightning_optkit.step.gathering import gathered, scatter_
from lightning_optkit.step.shards import has_whole_rows, local

__all__ = ["ClipUnitwise"]


@dataclass(frozen=True)
class ClipUnitwise(Clip):
    """Scales each unit's gradient so that its L2 norm is at most `ratio` times the norm of the unit's parameters.

    A unit is a row of the first dimension: the weights of one output of a linear layer or a convolution. A parameter of
    fewer than two dimensions is one unit. The authors exclude the last linear layer:
    `GradientClipping(ClipUnitwise(), leave_out=["head.*"])`.

    As part of a step it costs two reads of the gradients and one of the parameters, and no write; a step with a
    non-finite gradient is skipped, including its counters.

    Args:
        ratio: Largest unclipped |gradient| / |parameters| of a unit, in (0, inf); 0.01 for batches up to 4096.
        eps: Lower bound of the parameter norm in that ratio, so that units of zeros can grow; in (0, inf).

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        >>> weight.grad = torch.tensor([[0.6, 0.8], [0.6, 0.8]])
        >>> ClipUnitwise(0.5)([weight])
        tensor(1.4142)
        >>> weight.grad
        tensor([[0.6000, 0.8000],
                [0.1500, 0.2000]])
    """

    ratio: float = 0.01
    eps: float = 1e-3

    def __post_init__(self) -> None:
        check_in(type(self).__name__, "ratio", self.ratio, "(0, inf)")
        check_in(type(self).__name__, "eps", self.eps, "(0, inf)")

    @property
    def needs_norm(self) -> bool:
        """True: a non-finite gradient must be detected before anything is written."""
        return True

    @property
    def bounds(self) -> ClipBounds:
        """`ratio` for each unit."""
        return ClipBounds(unit_ratio=self.ratio, unit_eps=self.eps)

    @property
    def constant_bound(self) -> float | None:
        """As `norm_bound`, unless a subclass has another."""
        return math.inf if type(self).norm_bound is ClipUnitwise.norm_bound else None

    def norm_bound(self, norm: Tensor) -> float:
        """inf: the global norm is not bounded."""
        return math.inf

    @torch.no_grad()
    def __call__(self, parameters: Iterable[Tensor]) -> Tensor:
        """Clips the gradients of `parameters` in place, for use with any other optimizer.

        Returns:
            Their global norm before clipping, 0-d.
        """
        listed = check_tensors(type(self).__name__, "parameters", parameters)
        grads = gradients(type(self).__name__, listed)
        norms = each_norm(grads)
        trained = [parameter for parameter in listed if parameter.grad is not None]
        vectors = [parameter for parameter in trained if parameter.ndim < 2]
        weights = dict(zip(vectors, each_norm(vectors), strict=True))
        for parameter, grad_norm in zip(trained, norms, strict=True):
            if parameter.numel() > 0:
                self._clip(parameter, weights.get(parameter), grad_norm)
        return norm_of(grads, norms)

    def _clip(self, parameter: Tensor, weight_norm: Tensor | None, grad_norm: Tensor) -> None:
        """Clips the units of one gradient; a vector, whose norms are given, is one unit."""
        assert parameter.grad is not None
        if weight_norm is not None:
            self._scale_(local(parameter.grad), grad_norm, weight_norm)
            return
        weights, grad = self._units_of(parameter, parameter.grad)
        if has_whole_rows(weights) and has_whole_rows(grad):
            self._scale_rows_(local(grad), local(weights))
            return
        whole, of_weights = gathered([local(grad), local(weights)], [grad, weights])
        self._scale_rows_(whole, of_weights)
        scatter_(local(grad), whole, grad)

    def _scale_rows_(self, grad: Tensor, weights: Tensor) -> None:
        inner = list(range(1, weights.ndim))
        self._scale_(grad, norm(grad, inner, keepdim=True), norm(weights, inner, keepdim=True))

    def _scale_(self, grad: Tensor, grad_norm: Tensor, weight_norm: Tensor) -> None:
        bound = self.ratio * weight_norm.clamp(min=self.eps)
        coefficient = torch.where(grad_norm > bound, bound / grad_norm, 1.0)
        grad.mul_(coefficient.to(torch.promote_types(grad.dtype, torch.float32)))

    def _units_of(self, parameter: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The units that have a gradient, and their gradients; for a sparse gradient, only its rows."""
        if grad.layout != torch.sparse_coo:
            return parameter, grad
        if grad.sparse_dim() != 1 or parameter.ndim == 1:
            raise ValueError(
                f"{type(self).__name__}(parameters.grad=<torch.sparse_coo>): a sparse gradient must hold whole rows of "
                "a parameter of at least two dimensions, as that of an embedding does."
            )
        return parameter[sparse_indices(grad)[0]], sparse_values(grad)
