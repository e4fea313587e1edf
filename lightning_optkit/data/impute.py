# SPDX-License-Identifier: Apache-2.0
"""Replaces missing values by a statistic of the training set, with optional columns that mark where they were.

Source: Qiu 2020, Neural Networks and Deep Learning, Section 7.4; names as `sklearn.impute.SimpleImputer`.
Unlike scikit-learn, a feature without training values is refused, not dropped, unless `keep_empty_features=True`:
silently dropping columns would change the model's input.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_bools, check_in, check_int, check_one_of, check_whole
from lightning_optkit.data._categories import CATEGORIES, categories_of, merge_categories, most_frequent
from lightning_optkit.data._moments import MOMENTS, merge_moments, moments
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

__all__ = ["Impute"]


class Impute(nn.Module):
    """Replaces missing values by a statistic of the same feature over the training set.

    Args:
        strategy: The replacement: the mean, the median (exact up to `exact_rows` rows, see `RobustScale`), the most
            frequent value (the smallest in case of a tie; memory grows with the distinct values), or `fill_value`.
        fill_value: The replacement for "constant".
        missing_values: The marker of a missing value: NaN, or a number such as -1.
        add_indicator: Whether to append one column per feature that had missing values in training: 1 where the value
            is missing, else 0.
        keep_empty_features: Whether a feature without training values is filled with 0 instead of refused.
        exact_rows: Rows up to which medians are exact, in [2, inf).
        feature_dim: Dimension that counts the features: -1 for tables (N, D), 1 for images (N, C, H, W).

    Raises:
        ValueError: if an argument is outside its range; when fitting, if a value is infinite, a feature all missing,
            or shapes disagree.
        RuntimeError: if applied before it is fitted, or fitted further after `finalize()`.

    Cost: up to 4 D float64 numbers of state; while fitting also the rows or the distinct values the strategy needs.

    Example:
        >>> impute = Impute(add_indicator=True).fit(torch.tensor([[1.0, 5.0], [3.0, torch.nan]]))
        >>> impute(torch.tensor([[2.0, torch.nan]]))
        tensor([[2., 5., 1.]])
    """

    def __init__(
        self,
        strategy: Literal["mean", "median", "most_frequent", "constant"] = "mean",
        *,
        fill_value: float = 0.0,
        missing_values: float = math.nan,
        add_indicator: bool = False,
        keep_empty_features: bool = False,
        exact_rows: int = EXACT_ROWS,
        feature_dim: int = -1,
    ) -> None:
        super().__init__()
        check_one_of(type(self).__name__, "strategy", strategy, ("mean", "median", "most_frequent", "constant"))
        check_in(type(self).__name__, "fill_value", fill_value, "(-inf, inf)")
        if not (isinstance(missing_values, float) and math.isnan(missing_values)):
            check_in(type(self).__name__, "missing_values", missing_values, "(-inf, inf)")
        check_bools(type(self).__name__, add_indicator=add_indicator, keep_empty_features=keep_empty_features)
        check_whole(type(self).__name__, "feature_dim", feature_dim)
        self.strategy, self.fill_value, self.missing_values = strategy, fill_value, missing_values
        self.add_indicator, self.keep_empty_features, self.feature_dim = add_indicator, keep_empty_features, feature_dim
        self.exact_rows = check_int(type(self).__name__, "exact_rows", exact_rows, minimum=2)
        self.stats = Statistics("present", "missing", *MOMENTS, "sample", "weight", *CATEGORIES, "fill", "indicated")

    @property
    def fitted(self) -> bool:
        """Whether it can be applied."""
        return self.fill.numel() > 0

    @property
    def num_features(self) -> int:
        """Number of features seen when fitting, 0 before."""
        return self.stats["missing"].numel()

    @property
    def fill(self) -> Tensor:
        """Replacement of a missing value of every feature, shape (D,), float64."""
        return self.stats["fill"]

    def partial_fit(self, x: Tensor) -> "Impute":
        """Learns from one more batch, shape (N, ..., D) for `feature_dim=-1`."""
        require_open(type(self).__name__, self.fill)
        check_features(type(self).__name__, x, self.feature_dim, self.num_features)
        rows = feature_rows(
            type(self).__name__, self._marked(x), feature_dim=self.feature_dim, num_features=self.num_features
        )
        missing = rows.isnan().sum(dim=0).double()
        summary = {"missing": missing, "present": len(rows) - missing}
        if self.strategy == "mean":
            summary |= moments(rows)
        elif self.strategy == "median":
            summary |= sample_of(rows)
        elif self.strategy == "most_frequent":
            summary |= categories_of(rows)
        return self._absorb(summary)

    def merge(self, other: "Impute") -> "Impute":
        """Merges the statistics that `other` collected on other rows."""
        check_mergeable(self, other)
        require_open(type(self).__name__, self.fill)
        require_open(type(self).__name__, other.fill)
        return self._absorb(other.stats.named()) if other.num_features else self

    def finalize(self) -> "Impute":
        """Ends the fit: the transform can be applied, and the rows are discarded."""
        require_open(type(self).__name__, self.fill)
        present = self.stats["present"]
        refuse_empty = self.strategy != "constant" and not self.keep_empty_features
        require_finite_fit(type(self).__name__, present if refuse_empty else torch.ones_like(present))
        fill = torch.full_like(present, self.fill_value)
        if self.strategy == "mean":
            fill = self.stats["origin"] + self.stats["offset"]
        elif self.strategy == "median":
            fill = quantiles(self.stats.named(), [0.5])[0]
        elif self.strategy == "most_frequent":
            fill = most_frequent(self.stats.named(), self.num_features)
        if self.strategy != "constant":
            fill = fill.masked_fill(present == 0, 0.0)
        self.stats.update({"fill": fill, "indicated": self.stats["missing"].nonzero().flatten()})
        self.stats.clear(*MOMENTS, "sample", "weight", *CATEGORIES)
        return self

    def fit(self, batches: Tensor | Iterable[Tensor], *, across_ranks: bool = False) -> "Impute":
        """Fits anew in one pass over `batches` (a tensor is one batch); on all processes if `across_ranks`."""
        fit_batches(self, batches, across_ranks)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """`x` without missing values, in its floating dtype; indicator columns are appended along `feature_dim`."""
        require_fitted(type(self).__name__, self.fill)
        check_features(type(self).__name__, x, self.feature_dim, self.num_features)
        missing = self._is_missing(x)
        dtype = output_dtype(x)
        filled = torch.where(missing, to_feature_dim(self.fill, x, self.feature_dim).to(dtype), x.to(dtype))
        if not self.add_indicator:
            return filled
        return torch.cat(
            [filled, missing.index_select(self.feature_dim, self._indicated()).to(dtype)], self.feature_dim
        )

    def inverse(self, x: Tensor) -> Tensor:
        """Marks the values that `forward` filled as missing again; needs `add_indicator=True`.

        Raises:
            ValueError: if `add_indicator` is False, since the missing values are then unknown.
        """
        require_fitted(type(self).__name__, self.fill)
        if not self.add_indicator:
            raise ValueError(
                f"{type(self).__name__}(add_indicator=False): inverse needs add_indicator=True to know what was "
                "missing."
            )
        indicated = self._indicated()
        check_features(type(self).__name__, x, self.feature_dim, self.num_features + len(indicated))
        filled = x.narrow(self.feature_dim, 0, self.num_features)
        marks = x.narrow(self.feature_dim, self.num_features, len(indicated))
        missing = torch.zeros_like(filled).index_add(self.feature_dim, indicated, marks) > 0.5
        return filled.masked_fill(missing, self.missing_values)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return (
            f"{self.strategy!r}, fill_value={self.fill_value}, missing_values={self.missing_values}, "
            f"add_indicator={self.add_indicator}, keep_empty_features={self.keep_empty_features}, "
            f"exact_rows={self.exact_rows}, feature_dim={self.feature_dim}"
        )

    def _is_missing(self, x: Tensor) -> Tensor:
        return x.isnan() if math.isnan(self.missing_values) else x == self.missing_values

    def _marked(self, x: Tensor) -> Tensor:
        if not x.is_meta and not math.isnan(self.missing_values) and x.isnan().any():
            raise ValueError(
                f"{type(self).__name__}(missing_values={self.missing_values}): x has NaN, which is not what marks "
                "a gap."
            )
        return (x if x.is_floating_point() else x.double()).masked_fill(self._is_missing(x), torch.nan)

    def _indicated(self) -> Tensor:
        return self.stats["indicated"].long()

    def _absorb(self, summary: Mapping[str, Tensor]) -> "Impute":
        ours = self.stats.named()
        if self.num_features:
            counts = {name: ours[name] + summary[name].to(ours[name].device) for name in ("present", "missing")}
        else:
            counts = {name: summary[name] for name in ("present", "missing")}
        if self.strategy == "mean":
            counts |= merge_moments(ours, summary)
        elif self.strategy == "median":
            counts |= merge_samples(ours, summary, self.exact_rows)
        elif self.strategy == "most_frequent":
            counts |= merge_categories(ours, summary)
        self.stats.update(counts)
        return self
