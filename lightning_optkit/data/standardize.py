# SPDX-License-Identifier: Apache-2.0
"""Scales every feature to mean 0 and variance 1 over the training set.

Source: Qiu 2020, Neural Networks and Deep Learning, Section 7.4; names as `sklearn.preprocessing.StandardScaler`.
A feature counts as constant if its standard deviation is within 10 rounding errors of its mean, for any number of rows;
scikit-learn's bound grows with the number of rows.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_bools, check_whole
from lightning_optkit.data._moments import MOMENTS, merge_moments, moments
from lightning_optkit.data._statistics import (
    Statistics,
    check_features,
    check_mergeable,
    feature_rows,
    fit_batches,
    output_dtype,
    require_finite_fit,
    require_fitted,
    to_feature_dim,
)

__all__ = ["Standardize"]

_CONSTANT = 10 * torch.finfo(torch.float64).eps


class Standardize(nn.Module):
    r"""Subtracts the mean of the training set and divides by its standard deviation, feature by feature.

    .. math:: y = (x - \mu) / \sigma, \qquad \sigma^2 = \frac{1}{N} \sum_n (x_n - \mu)^2

    Missing values (NaN) are ignored during the fit and stay NaN. A constant feature is divided by 1. One pass over the
    data in float64; the result is the same, up to rounding, for any split of the rows into batches or processes.

    Args:
        with_mean: Whether to subtract the mean.
        with_std: Whether to divide by the standard deviation.
        feature_dim: Dimension of the features; statistics run over all others. -1 for tables (N, D), 1 for images (N,
            C, H, W).

    Raises:
        ValueError: when fitting, if a value is infinite, a feature is all missing, or shapes disagree.
        RuntimeError: if applied before it is fitted.

    Cost: 5 D float64 numbers of state. `forward` computes in float64 and returns the dtype of `x`.

    Example:
        >>> scale = Standardize().fit(torch.tensor([[1.0, 10.0], [3.0, 10.0]]))
        >>> scale(torch.tensor([[5.0, 10.0]]))
        tensor([[3., 0.]])
        >>> scale.inverse(torch.tensor([[3.0, 0.0]]))
        tensor([[ 5., 10.]])
    """

    def __init__(self, *, with_mean: bool = True, with_std: bool = True, feature_dim: int = -1) -> None:
        super().__init__()
        check_bools(type(self).__name__, with_mean=with_mean, with_std=with_std)
        check_whole(type(self).__name__, "feature_dim", feature_dim)
        self.with_mean, self.with_std, self.feature_dim = with_mean, with_std, feature_dim
        self.stats = Statistics(*MOMENTS, "scale")

    @property
    def fitted(self) -> bool:
        """Whether it can be applied."""
        return self.stats["scale"].numel() > 0

    @property
    def num_features(self) -> int:
        """Number of features seen when fitting, 0 before."""
        return self.stats["count"].numel()

    @property
    def mean(self) -> Tensor:
        """Mean of every feature, shape (D,), float64."""
        return self.stats["origin"] + self.stats["offset"]

    @property
    def var(self) -> Tensor:
        """Variance of every feature (divided by N), shape (D,), float64."""
        return self.stats["m2"] / self.stats["count"]

    @property
    def scale(self) -> Tensor:
        """Divisor of every feature, shape (D,), float64: 1 where it is constant."""
        return self.stats["scale"]

    def partial_fit(self, x: Tensor) -> "Standardize":
        """Learns from one more batch, shape (N, ..., D) for `feature_dim=-1`."""
        rows = feature_rows(type(self).__name__, x, feature_dim=self.feature_dim, num_features=self.num_features)
        self.stats.update(merge_moments(self.stats.named(), moments(rows)))
        self.stats.clear("scale")
        return self

    def merge(self, other: "Standardize") -> "Standardize":
        """Merges the statistics that `other` collected on other rows."""
        check_mergeable(self, other)
        self.stats.update(merge_moments(self.stats.named(), other.stats.named()))
        self.stats.clear("scale")
        return self

    def finalize(self) -> "Standardize":
        """Ends the fit: the transform can be applied."""
        require_finite_fit(type(self).__name__, self.stats["count"], self.stats["m2"])
        std = self.var.sqrt()
        constant = std <= _CONSTANT * self.mean.abs()
        self.stats["scale"] = torch.where(constant, 1.0, std) if self.with_std else torch.ones_like(std)
        return self

    def fit(self, batches: Tensor | Iterable[Tensor], *, across_ranks: bool = False) -> "Standardize":
        """Fits anew in one pass over `batches` (a tensor is one batch); on all processes if `across_ranks`."""
        fit_batches(self, batches, across_ranks)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The standardized `x`, in its shape and floating dtype (integers give the default dtype)."""
        origin, offset, scale = self._learned(x)
        return (((x.double() - origin) - offset) / scale).to(output_dtype(x))

    def inverse(self, x: Tensor) -> Tensor:
        """The inverse of `forward`."""
        origin, offset, scale = self._learned(x)
        return ((x.double() * scale + offset) + origin).to(output_dtype(x))

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"with_mean={self.with_mean}, with_std={self.with_std}, feature_dim={self.feature_dim}"

    def _learned(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        require_fitted(type(self).__name__, self.stats["scale"])
        check_features(type(self).__name__, x, self.feature_dim, self.num_features)
        origin, offset, scale = (
            to_feature_dim(self.stats[n], x, self.feature_dim) for n in ("origin", "offset", "scale")
        )
        return (origin, offset, scale) if self.with_mean else (origin * 0, offset * 0, scale)
