# SPDX-License-Identifier: Apache-2.0
"""The widest floating dtype of a device, for sums over many elements."""

import torch
from torch import Tensor

__all__ = ["wide"]


def wide(t: Tensor) -> Tensor:
    """The tensor in fp64, or in fp32 on a device without it (MPS); a complex one as pairs of real numbers.

    Example:
        >>> import torch
        >>> wide(torch.ones(1, dtype=torch.bfloat16))
        tensor([1.], dtype=torch.float64)
    """
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    return t.float() if t.device.type == "mps" else t.double()
