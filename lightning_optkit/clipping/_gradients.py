# SPDX-License-Identifier: Apache-2.0
"""The gradients that a standalone clip works on."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_optkit._checks import check_tensors
from lightning_optkit._norms import total_norm
from lightning_optkit._torch_private import sparse_values
from lightning_optkit.step.coefficients import clip_coefficient
from lightning_optkit.step.shards import local

__all__ = ["gradients", "norm_of", "scale_to_bound_"]


def gradients(owner: str, parameters: Iterable[Tensor]) -> list[Tensor]:
    """The existing gradients of one parameter or of many, to be changed in place; for sparse ones, their values.

    A sparse gradient is coalesced and a lazily conjugated one resolved; both are stored back.

    Raises:
        TypeError: if they are not tensors.
        ValueError: if a gradient is compressed or has no memory.
    """
    listed = check_tensors(owner, "parameters", parameters, sparse=True)
    for parameter in listed:
        if parameter.grad is not None and parameter.grad.layout == torch.sparse_coo:
            parameter.grad = parameter.grad.coalesce()
        elif parameter.grad is not None and parameter.grad.is_conj():
            parameter.grad = parameter.grad.resolve_conj()
    grads = [p.grad for p in listed if p.grad is not None]
    grads = [sparse_values(grad) if grad.layout == torch.sparse_coo else grad for grad in grads]
    check_tensors(owner, "parameters.grad", grads, meta=False)
    return grads


def norm_of(grads: list[Tensor], norms: list[Tensor] | None = None) -> Tensor:
    """Their global L2 norm, 0-d, in their dtype but at least fp32; over all processes if they are sharded.

    Args:
        grads: The gradients.
        norms: The norm of each, if it is known.
    """
    return _narrowed(total_norm(grads if norms is None else norms), grads)


@torch.no_grad()
def scale_to_bound_(owner: str, parameters: Iterable[Tensor], norm_bound: Callable[[Tensor], Tensor | float]) -> Tensor:
    """Scales the gradients of `parameters` by one factor, down to the bound of their global norm; returns that norm.

    Without gradients `norm_bound` is not called, since there is no norm to learn from.
    """
    grads = gradients(owner, parameters)
    norm = total_norm(grads)
    if not grads:
        return _narrowed(norm, grads)
    coefficient = clip_coefficient(norm_bound(norm), norm)
    for grad in grads:
        local(grad).mul_(coefficient.to(grad.device))
    return _narrowed(norm, grads)


def _narrowed(norm: Tensor, grads: list[Tensor]) -> Tensor:
    dtype = grads[0].dtype.to_real() if grads else torch.float32
    return norm.to(torch.promote_types(dtype, torch.float32))
