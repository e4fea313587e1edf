# SPDX-License-Identifier: Apache-2.0
"""R-Drop: penalizes the difference of two forward passes with different dropout.

Source: Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks", arXiv:2106.14448, Section 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_optkit._checks import check_bools, check_one_of, check_tensor, check_whole

__all__ = ["r_drop"]


def r_drop(logits: Tensor, other: Tensor, *, binary: bool = False, reduction: str = "mean", dim: int = 1) -> Tensor:
    r"""The symmetric Kullback-Leibler divergence of two predictions for the same inputs.

    .. math:: \tfrac{1}{2}\left(D_{KL}(P_1 \| P_2) + D_{KL}(P_2 \| P_1)\right)

    Gradients flow into both. It is 0 if they agree.

    Args:
        logits: Logits of the first pass, classes in dimension `dim`; or log-probabilities.
        other: Those of the second pass, same shape.
        binary: Whether every element is the logit of a binary prediction.
        reduction: "mean" over predictions, "sum", or "none": one value per prediction.
        dim: Dimension of the classes; unused if `binary`.

    Raises:
        TypeError: if `logits` or `other` is not a floating tensor.
        ValueError: if the shapes differ, or for another reduction.

    Example:
        >>> r_drop(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor(0.)
    """
    check_tensor("r_drop", "logits", logits, "floating")
    check_tensor("r_drop", "other", other, "floating")
    check_bools("r_drop", binary=binary)
    check_one_of("r_drop", "reduction", reduction, ("mean", "sum", "none"))
    check_whole("r_drop", "dim", dim)
    if not binary and not -logits.dim() <= dim < logits.dim():
        raise ValueError(f"r_drop(dim={dim}): logits of shape {tuple(logits.shape)} have no such dimension.")
    if logits.shape != other.shape:
        raise ValueError(f"r_drop(other.shape={tuple(other.shape)}): must be that of logits, {tuple(logits.shape)}.")
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits, other = logits.to(wide), other.to(wide)
    # 1/2 sum (p - q) (log p - log q) covers both directions. For a binary prediction, log p - log q of the two outcomes
    # differ by the difference of the logits.
    if binary:
        divergence = 0.5 * (logits.sigmoid() - other.sigmoid()) * (logits - other)
    else:
        p, q = F.log_softmax(logits, dim), F.log_softmax(other, dim)
        divergence = 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(dim)
    if reduction == "none":
        return divergence
    return divergence.mean() if reduction == "mean" else divergence.sum()
