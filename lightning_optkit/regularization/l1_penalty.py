# SPDX-License-Identifier: Apache-2.0
"""The sum of absolute values, as a term of a loss.

Source: Tibshirani 1996, "Regression shrinkage and selection via the lasso"; Qiu, NNDL 7.7.1.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_optkit._checks import check_in, check_tensors

__all__ = ["l1_penalty"]


def l1_penalty(params: Iterable[Tensor], strength: float = 1.0) -> Tensor:
    r"""Returns :math:`\lambda \sum_i |w_i|`, differentiable; its gradient at 0 is 0.

    As a loss term it moves weights toward zero, but gradient steps overshoot, so none is exactly zero. Exact zeros need
    the proximal step: `soft_threshold_` or the `l1` of this package's optimizers.

    Args:
        params: Parameters, e.g. `weights_of(module).values()`; complex ones by modulus.
        strength: Lambda, in [0, inf).

    Raises:
        ValueError: if `strength` is out of range, or there are no parameters.

    Example:
        >>> l1_penalty([torch.tensor([1.0, -2.0])], 0.5)
        tensor(1.5000)
    """
    strength = check_in("l1_penalty", "strength", strength, "[0, inf)")
    params = check_tensors("l1_penalty", "params", params, "inexact", empty=False)
    terms = [param.abs().sum() for param in params]
    return strength * torch.stack([term.to(terms[0].device) for term in terms]).sum()
