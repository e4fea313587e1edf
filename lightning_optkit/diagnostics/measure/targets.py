# SPDX-License-Identifier: Apache-2.0
"""The targets of a whole validation, in sums: what the best constant prediction would score on them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_optkit.diagnostics._guard import Guarding, unguarded
from lightning_optkit.diagnostics._signals import TargetsSeen
from lightning_optkit.diagnostics.measure.called_loss import CalledLoss
from lightning_optkit.diagnostics.measure.wide import wide

__all__ = ["CalledTargets"]

_BINARY = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
_PLAIN = {"weight": None, "pos_weight": None, "label_smoothing": 0.0, "reduction": "mean"}


class CalledTargets(CalledLoss):
    """Sums up the targets of the loss function that is called while it is entered, once per batch.

    What no sum tells is unknown: a loss that is weighted, smoothed or a sum, targets that are probabilities of several
    classes, L1 and Huber losses, or several calls in a batch, or different ones.
    """

    def __init__(self, guard: Guarding = unguarded) -> None:
        super().__init__(guard)
        self._function: Any = None
        self._shift: Any = 0.0  # of squares: far from 0, their sum would lose the variance

    @torch.no_grad()
    def _take(self, function: Any, arguments: dict[str, Any]) -> bool:
        given, target = arguments["input"].detach(), arguments["target"].detach()
        is_plain = all(arguments.get(name, plain) == plain for name, plain in _PLAIN.items())
        if not is_plain or not target.ndim or self._function not in (None, function):
            return False
        self._function = function
        if function is F.mse_loss and not self._sums:
            self._shift = wide(target).mean()
        sums = _sums(function, given, target, arguments, self._shift)
        if sums is None or (self._sums and sums[1].shape != self._sums[1].shape):
            return False
        self._add(sums, len(target))
        return True

    def seen(self) -> TargetsSeen | None:
        """What was seen; None if unknown. To be asked once: it reads from the device."""
        if not self._is_known or not self._sums or self._samples < 2:
            return None
        count = float(self._sums[0])
        if count < 2:
            return None
        if self._function is F.mse_loss:
            mean = self._sums[1] / count
            constant = float(((self._sums[2] / count - mean.square()).clamp(min=0)).mean()) * count / (count - 1)
            return TargetsSeen(constant, self._samples, is_squared=True)
        shares = self._sums[1] / count
        if self._function in _BINARY:
            entropy = torch.special.entr(shares) + torch.special.entr(1 - shares)
            return TargetsSeen(float(entropy.mean()) + 1 / (2 * count), self._samples, is_squared=False)
        few = (int((shares > 0).sum()) - 1) / (2 * count)  # Miller 1955: the bias of few samples
        counts = tuple(int(each) for each in self._sums[1].tolist())
        return TargetsSeen(
            float(torch.special.entr(shares).sum()) + few, self._samples, is_squared=False, counts=counts
        )


def _sums(function: Any, given: Tensor, target: Tensor, arguments: dict[str, Any], shift: Any) -> list[Tensor] | None:
    """Number of targets, their sum by column (classes: their counts), and that of their squares; None if unknown."""
    if function in (F.cross_entropy, F.nll_loss):
        if target.is_floating_point() or given.ndim < 2:
            return None
        counted = target.reshape(-1)[target.reshape(-1) != arguments["ignore_index"]]
        counts = wide(torch.bincount(counted, minlength=given.shape[1]))
        return [counts.sum(), counts]
    if function not in (F.mse_loss, *_BINARY) or given.shape != target.shape:
        return None
    numbers = wide(target).reshape(len(target), -1) - shift
    count = numbers.new_full((), len(target))
    if function in _BINARY:
        return [count, numbers.clamp(0, 1).sum(0)]
    return [count, numbers.sum(0), numbers.square().sum(0)]
