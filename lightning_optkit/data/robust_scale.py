# SPDX-License-Identifier: Apache-2.0
"""Scales every feature to median 0 and interquartile range 1 over the training set, which is robust to outliers.

Source: names and definitions as `sklearn.preprocessing.RobustScaler`; for the quantiles see `_quantiles.py`.
"""

from collections.abc import Iterable
from statistics import NormalDist

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_bools, check_int, check_numbers, check_whole
from lightning_optkit.data._quantiles import EXACT_ROWS, merge_samples, quantiles, sample_of
from lightning_optkit.data._statistics import (
    Statistics,
    check_features,
    check_mergeable,
    feature_rows,
    fit_batches,
    output_dtype,
    require_finite_fit,
    require_fitted,
    require_open,
    to_feature_dim,
)

__all__ = ["RobustScale"]


class RobustScale(nn.Module):
    r"""Subtracts the median of the training set and divides by a range between two quantiles, feature by feature.

    .. math:: y = (x - q_{50}) / (q_{75} - q_{25})

    Missing values (NaN) are ignored during the fit and stay NaN. A feature without spread is divided by 1. The rows are
    kept during the fit and discarded by `finalize()`. Exact up to `exact_rows` rows; beyond that, for N rows, the rank
    of a quantile is off by at most ceil(L / 2) / exact_rows of N, with L = ceil(log2(N / exact_rows)).

    Args:
        with_centering: Whether to subtract the median.
        with_scaling: Whether to divide by the range.
        quantile_range: Lower and upper quantile (percent), in [0, 100].
        unit_variance: Whether to scale further so that a normal feature has variance 1.
        exact_rows: Rows up to which quantiles are exact, and number of rows kept per weight beyond that, in [2, inf).
        feature_dim: Dimension that counts the features: -1 for tables (N, D), 1 for images (N, C, H, W).

    Raises:
        ValueError: if an argument is outside its range; when fitting, if a value is infinite, a feature all missing,
            or shapes disagree.
        RuntimeError: if applied before it is fitted, or fitted further after `finalize()`.

    Cost: 2 D float64 numbers of state; while fitting also exact_rows * D for every doubling of exact_rows rows.
    `forward` computes in float64 and returns the dtype of `x`.

    Example:
        >>> scale = RobustScale().fit(torch.tensor([[1.0], [2.0], [3.0], [4.0], [1000.0]]))
        >>> scale(torch.tensor([[3.0], [5.0]]))
        tensor([[0.],
                [1.]])
    """

    def __init__(
        self,
        *,
        with_centering: bool = True,
        with_scaling: bool = True,
        quantile_range: tuple[float, float] = (25.0, 75.0),
        unit_variance: bool = False,
        exact_rows: int = EXACT_ROWS,
        feature_dim: int = -1,
    ) -> None:
        super().__init__()
        low, high = check_numbers(type(self).__name__, "quantile_range", quantile_range, 2, "[0, 100]")
        check_bools(
            type(self).__name__, with_centering=with_centering, with_scaling=with_scaling, unit_variance=unit_variance
        )
        check_whole(type(self).__name__, "feature_dim", feature_dim)
        if not low < high or (unit_variance and (low == 0 or high == 100)):
            ends = "strictly between 0 and 100 for unit_variance" if unit_variance else "in increasing order"
            raise ValueError(f"{type(self).__name__}(quantile_range={quantile_range}): the ends must be {ends}.")
        self.with_centering, self.with_scaling = with_centering, with_scaling
        self.quantile_range, self.unit_variance = (low, high), unit_variance
        self.exact_rows = check_int(type(self).__name__, "exact_rows", exact_rows, minimum=2)
        self.feature_dim = feature_dim
        self.stats = Statistics("sample", "weight", "center", "scale")

    @property
    def center(self) -> Tensor:
        """Median of every feature, shape (D,), float64."""
        return self.stats["center"]

    @property
    def scale(self) -> Tensor:
        """Divisor of every feature, shape (D,), float64."""
        return self.stats["scale"]

    @property
    def fitted(self) -> bool:
        """Whether it can be applied."""
        return self.center.numel() > 0

    @property
    def num_features(self) -> int:
        """Number of features seen when fitting, 0 before."""
        return self.center.numel() or self.stats["sample"].shape[-1]

    def partial_fit(self, x: Tensor) -> "RobustScale":
        """Learns from one more batch, shape (N, ..., D) for `feature_dim=-1`."""
        require_open(type(self).__name__, self.center)
        rows = feature_rows(type(self).__name__, x, feature_dim=self.feature_dim, num_features=self.num_features)
        self.stats.update(merge_samples(self.stats.named(), sample_of(rows), self.exact_rows))
        return self

    def merge(self, other: "RobustScale") -> "RobustScale":
        """Merges the statistics that `other` collected on other rows."""
        check_mergeable(self, other)
        require_open(type(self).__name__, self.center)
        require_open(type(self).__name__, other.center)
        self.stats.update(merge_samples(self.stats.named(), other.stats.named(), self.exact_rows))
        return self

    def finalize(self) -> "RobustScale":
        """Ends the fit: the transform can be applied, and the rows are discarded."""
        require_open(type(self).__name__, self.center)
        seen = ~self.stats["sample"].isnan()
        require_finite_fit(type(self).__name__, seen.sum(dim=0).double() if len(seen) else self.center)
        low, high = self.quantile_range
        lower, center, upper = quantiles(self.stats.named(), [low / 100, 0.5, high / 100])
        spread = upper - lower
        require_finite_fit(type(self).__name__, spread.new_ones(len(spread)), spread)
        scale = torch.where(spread.reciprocal().isinf(), 1.0, spread)  # zero, or within 1e-308 of it
        if self.unit_variance:
            scale = scale / (NormalDist().inv_cdf(high / 100) - NormalDist().inv_cdf(low / 100))
        self.stats.update({"center": center, "scale": scale if self.with_scaling else torch.ones_like(scale)})
        self.stats.clear("sample", "weight")
        return self

    def fit(self, batches: Tensor | Iterable[Tensor], *, across_ranks: bool = False) -> "RobustScale":
        """Fits anew in one pass over `batches` (a tensor is one batch); on all processes if `across_ranks`."""
        fit_batches(self, batches, across_ranks)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The scaled `x`, in its shape and floating dtype (integers give the default dtype)."""
        center, scale = self._learned(x)
        return ((x.double() - center) / scale).to(output_dtype(x))

    def inverse(self, x: Tensor) -> Tensor:
        """The inverse of `forward`."""
        center, scale = self._learned(x)
        return (x.double() * scale + center).to(output_dtype(x))

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return (
            f"with_centering={self.with_centering}, with_scaling={self.with_scaling}, "
            f"quantile_range={self.quantile_range}, unit_variance={self.unit_variance}, "
            f"exact_rows={self.exact_rows}, feature_dim={self.feature_dim}"
        )

    def _learned(self, x: Tensor) -> tuple[Tensor, Tensor]:
        require_fitted(type(self).__name__, self.center)
        check_features(type(self).__name__, x, self.feature_dim, self.num_features)
        center, scale = (to_feature_dim(value, x, self.feature_dim) for value in (self.center, self.scale))
        return (center, scale) if self.with_centering else (torch.zeros_like(center), scale)
