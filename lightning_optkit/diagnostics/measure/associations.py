# SPDX-License-Identifier: Apache-2.0
"""How predictions go with their targets: by how much less loss they have than with those of others, and in any way.

Source: Hoeffding 1951, "A combinatorial central limit theorem", Ann. Math. Stat. 22(4): mean and variance of a sum of
paired values if the pairs are exchanged at random. The losses of torch that are taken here depend on a prediction and
a target together only by their product, so all pairs of a batch are one matrix product, and no forward pass is needed.
Pillai 1955, "Some new test criteria in multivariate analysis", Ann. Math. Stat. 26(1): the sum of squared canonical
correlations, which finds predictions that tell targets without being like them.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_optkit.diagnostics._guard import Guarding, unguarded
from lightning_optkit.diagnostics._signals import AssociationSeen, DependenceSeen
from lightning_optkit.diagnostics.measure.called_loss import CalledLoss
from lightning_optkit.diagnostics.measure.wide import wide

__all__ = ["CalledAssociations", "paired"]

_CLASSES = (F.cross_entropy, F.nll_loss)
_ROUNDING = 1e-6  # of fp32: predictions that differ by less are one
_MOST_SAMPLES, _MOST_NUMBERS = 512, 2**22  # of a batch; more are left out
_MOST_COLUMNS = 32  # of predictions and of targets: their products cost as little as those of the samples
_FREE = 2  # judgement: samples per column, below which columns fit each other by chance


class CalledAssociations(CalledLoss):
    """Sums up the association in the loss function that is called while it is entered, once per batch.

    It is unknown for a loss of several terms or with weights, for targets that are probabilities of several classes,
    and for L1 and Huber losses. The sums are of the gains, of their variance if pairs are exchanged, of gains by it,
    and of batches where there is any; then, about the mean of each batch, of products of the columns of predictions and
    targets, while these are of one shape.
    """

    def __init__(self, guard: Guarding = unguarded) -> None:
        super().__init__(guard)
        self._products: list[Tensor] = []
        self._free, self._is_one_shape = 0, True  # samples less one per batch

    @torch.no_grad()
    def _take(self, function: Any, arguments: dict[str, Any]) -> bool:
        with torch.autocast(arguments["input"].device.type, enabled=False):
            columns = _columns(function, arguments)
            if columns is None:
                return False
            found, num = _paired(*columns), len(columns[0])
            if num > 1:
                self._add_products(*columns[:2])
        if num > 1:  # a single sample has no other to be exchanged with
            centered = found - found.mean(0) - found.mean(1, keepdim=True) + found.mean()
            varies = centered.abs().amax() > _ROUNDING * found.abs().amax()
            gain = torch.where(varies, centered.diagonal().sum(), 0.0)
            variance = torch.where(varies, centered.square().sum() / (num - 1), 0.0)
            sums = [gain, variance, torch.where(varies, gain.square() / variance, 0.0), varies.to(gain.dtype)]
            self._add(sums, num)
        return True

    def _add_products(self, x: Tensor, y: Tensor) -> None:
        x, y = (each[:, :: -(-each.shape[1] // _MOST_COLUMNS)] for each in (x, y))
        x, y = (each - each.mean(0) for each in (x, y))
        products = [x.T @ x, x.T @ y, y.T @ y]
        if not self._products:
            self._products = [torch.zeros_like(each) for each in products]
        self._is_one_shape &= all(a.shape == b.shape for a, b in zip(self._products, products, strict=True))
        if self._is_one_shape:
            self._products = [a + b for a, b in zip(self._products, products, strict=True)]
            self._free += len(x) - 1

    def seen(self) -> AssociationSeen | None:
        """What was seen; None if unknown. To be asked once: it reads from the device."""
        if not self._is_known or not self._sums:
            return None
        gain, variance, squares, batches = torch.stack(self._sums).tolist()
        count, scatter = self._samples, squares / max(batches, 1.0)
        dependence = _dependence(self._products, self._free) if self._is_one_shape else None
        return AssociationSeen(gain / count, variance**0.5 / count, count, int(batches), scatter, dependence)


def _dependence(products: list[Tensor], free: int) -> DependenceSeen | None:
    """From products of x with x, x with y and y with y of so many free samples; None if they are too few."""
    xx, xy, yy = (each.double() for each in (part.cpu() for part in products))  # autocast leaves fp64 as it is
    if not all(bool(each.isfinite().all()) for each in (xx, xy, yy)):
        return None
    left, right = _whitening(xx), _whitening(yy)
    p, q = left.shape[1], right.shape[1]
    if not p or not q or free < _FREE * (p + q):
        return None
    squares = torch.linalg.svdvals(left.T @ xy @ right).square()  # canonical correlations
    trace = float(squares.sum())
    mean, variance = p * q, 2 * p * q * (free - p) * (free - q) / ((free - 1) * (free + 2))
    # A multiple of a chi-square of the same mean and variance, of which the cube root is nearly normal (Wilson and
    # Hilferty 1931).
    spread = 2 / 9 * variance / (2 * mean**2)
    deviates = (math.copysign(abs(free * trace / mean) ** (1 / 3), trace) - 1 + spread) / spread**0.5
    edge = (p**0.5 + q**0.5) ** 2 / free  # of independent columns, about (Wachter 1980; Johnstone 2001)
    return DependenceSeen(trace - mean / free, deviates, p * q, free, float(squares.max()) - edge)


def _whitening(products: Tensor) -> Tensor:
    """Columns that turn those of these products into independent ones of norm 1."""
    values, vectors = torch.linalg.eigh(products)
    kept = values > _ROUNDING * values.abs().max()
    whitening: Tensor = vectors[:, kept] / values[kept].sqrt()
    return whitening


def paired(function: Any, arguments: dict[str, Any]) -> Tensor | None:
    """Samples x samples: minus the loss of each prediction with each target, but for what depends on one of them alone.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> outputs, targets = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
        >>> paired(F.mse_loss, {"input": outputs, "target": targets})  # 2 x y of (x - y)^2 = x^2 + y^2 - 2 x y
        tensor([[ 6.,  8.],
                [12., 16.]], dtype=torch.float64)
    """
    columns = _columns(function, arguments)
    return None if columns is None else _paired(*columns)


def _paired(x: Tensor, y: Tensor, places: int) -> Tensor:
    return x @ y.T / places


def _columns(function: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, int] | None:
    """Predictions and targets in columns, of which products count, in the mean over so many places; None if unknown."""
    given, target = arguments["input"].detach(), arguments["target"].detach()
    if not target.ndim or not len(target) or any(arguments.get(name) is not None for name in ("weight", "pos_weight")):
        return None
    given, target = given[:_MOST_SAMPLES], target[:_MOST_SAMPLES]
    if function in _CLASSES:
        return _columns_of_classes(given, target, arguments["ignore_index"])
    if given.shape != target.shape or function in (F.l1_loss, F.smooth_l1_loss, F.huber_loss):
        return None
    places = max(1, _MOST_NUMBERS // len(given))
    x, y = (wide(each).reshape(len(each), -1)[:, :places] for each in (given, target))
    if function is F.mse_loss:
        x = 2 * x
    elif function is F.binary_cross_entropy:
        x = torch.logit(x, eps=1e-6)
    return x, y, x.shape[1]


def _columns_of_classes(given: Tensor, target: Tensor, ignored: int) -> tuple[Tensor, Tensor, int] | None:
    """The same for scores of classes, in the second dimension."""
    if target.is_floating_point() or given.ndim < 2 or len(given) != len(target):
        return None
    num, classes = given.shape[:2]
    places = max(1, _MOST_NUMBERS // (num * classes))
    scores = F.log_softmax(wide(given).reshape(num, classes, -1)[..., :places], 1)
    chosen = target.reshape(num, 1, -1)[..., :places]
    counts = (chosen != ignored).to(scores.dtype)
    chosen = chosen.clamp(0, classes - 1)
    hot = torch.zeros_like(scores).scatter_(1, chosen, counts)
    return scores.reshape(num, -1), hot.reshape(num, -1), chosen.shape[2]
