# SPDX-License-Identifier: Apache-2.0
"""L1 and L2 together, as a term of a loss.

Source: Zou & Hastie 2005, "Regularization and variable selection via the elastic net", Section 2; Qiu, NNDL 7.7.1.
"""

from collections.abc import Iterable

from torch import Tensor

from lightning_optkit._checks import check_in, check_tensors
from lightning_optkit.regularization.l1_penalty import l1_penalty
from lightning_optkit.regularization.l2_penalty import l2_penalty

__all__ = ["elastic_net"]


def elastic_net(params: Iterable[Tensor], l1: float, l2: float) -> Tensor:
    r"""Returns :math:`\lambda_1 \sum_i |w_i| + \frac{\lambda_2}{2} \sum_i |w_i|^2`.

    Args:
        params: Parameters, e.g. `weights_of(module).values()`.
        l1: Lambda 1, in [0, inf).
        l2: Lambda 2, in [0, inf).

    Raises:
        ValueError: if a strength is out of range, or there are no parameters.

    Example:
        >>> import torch
        >>> elastic_net([torch.tensor([1.0, -2.0])], l1=1.0, l2=2.0)
        tensor(8.)
    """
    check_in("elastic_net", "l1", l1, "[0, inf)")
    check_in("elastic_net", "l2", l2, "[0, inf)")
    listed = check_tensors("elastic_net", "params", params, "inexact", empty=False)
    return l1_penalty(listed, l1) + l2_penalty(listed, l2)
