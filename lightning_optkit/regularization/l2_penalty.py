# SPDX-License-Identifier: Apache-2.0
"""Half the sum of squares, as a term of a loss.

Source: Hoerl & Kennard 1970, "Ridge regression"; Krogh & Hertz 1992, "A simple weight decay can improve
generalization".
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_optkit._checks import check_in, check_tensors

__all__ = ["l2_penalty"]


def l2_penalty(params: Iterable[Tensor], strength: float = 1.0) -> Tensor:
    r"""Returns :math:`\frac{\lambda}{2} \sum_i |w_i|^2`, whose gradient is :math:`\lambda w`.

    With plain SGD it equals `weight_decay=strength`. An adaptive rule divides this gradient like any other, so that
    weights with large gradients decay less; decoupled decay (AdamW) does not, see `examples/claims/weight_decay.py`.

    Args:
        params: Parameters, e.g. `weights_of(module).values()`; complex ones by modulus.
        strength: Lambda, in [0, inf).

    Raises:
        ValueError: if `strength` is out of range, or there are no parameters.

    Example:
        >>> l2_penalty([torch.tensor([1.0, -2.0])], 0.5)
        tensor(1.2500)
    """
    strength = check_in("l2_penalty", "strength", strength, "[0, inf)")
    params = check_tensors("l2_penalty", "params", params, "inexact", empty=False)
    terms = [(param.abs() if torch.is_complex(param) else param).square().sum() for param in params]
    return 0.5 * strength * torch.stack([term.to(terms[0].device) for term in terms]).sum()
