# SPDX-License-Identifier: Apache-2.0
"""Label smoothing: a small part of every target's probability is spread evenly over all classes.

Source: Szegedy et al. 2016, "Rethinking the Inception Architecture", arXiv:1512.00567, Section 7.
"""

import torch
from torch import Tensor

from lightning_optkit._checks import check_in, check_int, check_tensor

__all__ = ["label_smoothing"]


def label_smoothing(
    target: Tensor, smoothing: float = 0.1, num_classes: int | None = None, *, weight: Tensor | None = None
) -> Tensor:
    r"""Returns probabilities in place of hard targets.

    .. math:: q'(k) = (1 - \varepsilon)\, q(k) + \varepsilon / K

    As targets of `torch.nn.functional.cross_entropy` they are equivalent to its own `label_smoothing`; unlike that,
    they work with any loss that takes probabilities. With class weights, torch divides the mean by the weights of the
    targets if they are indices, but by their number if they are probabilities: pass `weight` here too.

    Args:
        target: Class indices of any shape (...), with `num_classes`; or probabilities (..., K). With `num_classes=1`,
            binary probabilities of any shape; K is then 2.
        smoothing: Epsilon, in [0, 1).
        num_classes: K, in [1, inf).
        weight: The class weights (K,) of a loss with reduction "mean", for class indices. The result is multiplied by
            the number of targets over the sum of their weights, so that the loss is divided by the latter.

    Returns:
        Probabilities, (..., K) in the default dtype for indices, else in the shape and dtype of `target`.

    Raises:
        TypeError: if `target` is not a tensor.
        ValueError: if an argument is out of range; on the CPU also if a target is.

    Source: Szegedy et al. 2016, arXiv:1512.00567, Section 7; the division as in `torch.nn.CrossEntropyLoss`.

    Example:
        >>> label_smoothing(torch.tensor([2, 0]), 0.3, num_classes=3)
        tensor([[0.1000, 0.1000, 0.8000],
                [0.8000, 0.1000, 0.1000]])
        >>> label_smoothing(torch.tensor([1.0, 0.0]), 0.1, num_classes=1)
        tensor([0.9500, 0.0500])
    """
    smoothing = check_in("label_smoothing", "smoothing", smoothing, "[0, 1)")
    check_tensor("label_smoothing", "target", target, "real")
    if num_classes is not None:
        check_int("label_smoothing", "num_classes", num_classes, minimum=1)
    if target.is_floating_point():
        if weight is not None:
            raise ValueError(
                "label_smoothing(weight=<Tensor>): weight must be None for probabilities; torch divides their loss by "
                "their number."
            )
        _check_range(target, 0.0, 1.0, "probabilities must be in [0, 1]")
        if target.dim() == 0 and num_classes != 1:
            raise ValueError("label_smoothing(target.shape=()): probabilities must be (..., K).")
        classes = 2 if num_classes == 1 else target.shape[-1]
        if num_classes not in (None, 1, classes):
            raise ValueError(f"label_smoothing(num_classes={num_classes}): target has {classes} classes.")
        return target * (1.0 - smoothing) + smoothing / classes
    if num_classes is None or num_classes == 1:
        raise ValueError(f"label_smoothing(num_classes={num_classes}): class indices need num_classes, at least 2.")
    _check_range(target, 0, num_classes - 1, f"class indices must be in [0, {num_classes})")
    hard = torch.nn.functional.one_hot(target.long(), num_classes).to(torch.get_default_dtype())
    smoothed = hard * (1.0 - smoothing) + smoothing / num_classes
    return smoothed if weight is None else smoothed * _per_weight(target, weight, num_classes)


def _per_weight(target: Tensor, weight: Tensor, num_classes: int) -> Tensor:
    """The number of targets over the sum of their weights."""
    check_tensor("label_smoothing", "weight", weight, "floating")
    if weight.shape != (num_classes,):
        raise ValueError(f"label_smoothing(weight.shape={tuple(weight.shape)}): weight must be ({num_classes},).")
    return target.numel() / weight[target.long()].sum()


def _check_range(target: Tensor, low: float, high: float, requirement: str) -> None:
    # On a GPU the check would synchronize; in a compiled function it would break the graph.
    if target.device.type != "cpu" or not target.numel() or torch.compiler.is_compiling():
        return
    for value in (target.min().item(), target.max().item()):
        if not low <= value <= high:
            raise ValueError(f"label_smoothing(target={value:g}): {requirement}.")
