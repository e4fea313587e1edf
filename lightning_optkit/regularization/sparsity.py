# SPDX-License-Identifier: Apache-2.0
"""How many weights are exactly zero, per parameter."""

from collections.abc import Mapping

from torch import Tensor

__all__ = ["sparsity"]


def sparsity(params: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of exact zeros in each parameter, in [0, 1]; 0 for an empty one.

    Args:
        params: Name -> parameter, e.g. `weights_of(module)`.

    Example:
        >>> import torch
        >>> sparsity({"weight": torch.tensor([0.0, 1.0, -0.0, 2.0])})
        {'weight': 0.5}
    """
    return {
        name: float((param.detach() == 0).float().mean()) if param.numel() else 0.0 for name, param in params.items()
    }
