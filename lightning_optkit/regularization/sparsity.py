# SPDX-License-Identifier: Apache-2.0
"""The fraction of weights that are exactly zero, per parameter."""

from collections.abc import Mapping

from torch import Tensor

from lightning_optkit._checks import check_mapping, check_tensor

__all__ = ["sparsity"]


def sparsity(params: Mapping[str, Tensor]) -> dict[str, float]:
    """Fraction of exact zeros in each parameter, in [0, 1]; 0 for an empty one.

    Args:
        params: Name -> parameter, e.g. `weights_of(module)`. Sharded ones (DTensor) are counted over all processes,
            which must all call this.

    Raises:
        TypeError: if `params` is not a dict of tensors.

    Example:
        >>> import torch
        >>> sparsity({"weight": torch.tensor([0.0, 1.0, -0.0, 2.0])})
        {'weight': 0.5}
    """
    named = check_mapping("sparsity", "params", params, "a dict of named tensors, such as weights_of(model)")
    for name, param in named.items():
        check_tensor("sparsity", f"params[{name!r}]", param, meta=False)
    return {name: _zeros_in(param) / param.numel() if param.numel() else 0.0 for name, param in named.items()}


def _zeros_in(param: Tensor) -> int:
    zeros = (param.detach() == 0).sum()
    return int(zeros.full_tensor() if hasattr(zeros, "full_tensor") else zeros)
