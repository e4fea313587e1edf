# SPDX-License-Identifier: Apache-2.0
"""The gradients that a clip called by itself works on."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optkit._checks import check_tensors

__all__ = ["gradients", "norm_of", "scale_to_bound_"]


def gradients(owner: str, parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients there are, of one parameter or of many.

    Raises:
        TypeError: if they are no tensors.
        ValueError: if a gradient is sparse.
    """
    listed = check_tensors(owner, "parameters", parameters, sparse=True)
    grads = [p.grad for p in listed if p.grad is not None]
    check_tensors(owner, "parameters.grad", grads, meta=False)
    return grads


def norm_of(grads: list[Tensor]) -> Tensor:
    """Their global L2 norm, 0-d, in at least fp32; over all processes, if they are sharded."""
    norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norm.to(torch.promote_types(norm.dtype, torch.float32))


@torch.no_grad()
def scale_to_bound_(owner: str, parameters: Iterable[Tensor], norm_bound: Callable[[Tensor], Tensor]) -> Tensor:
    """Scales the gradients of `parameters` by one factor, to the bound for their global norm; returns that norm."""
    grads = gradients(owner, parameters)
    norm = norm_of(grads)
    coefficient = (norm_bound(norm) / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(coefficient.to(grad.device))
    return norm
