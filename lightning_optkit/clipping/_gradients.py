# SPDX-License-Identifier: Apache-2.0
"""The gradients that a clip called by itself works on."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["gradients", "norm_of"]


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients there are, of one parameter or of many."""
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    return [p.grad for p in parameters if p.grad is not None]


def norm_of(grads: list[Tensor]) -> Tensor:
    """Their global L2 norm, 0-d, in at least fp32; over all processes, if they are sharded."""
    norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norm.to(torch.promote_types(norm.dtype, torch.float32))
