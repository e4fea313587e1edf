# SPDX-License-Identifier: Apache-2.0
"""Scales every feature to a given range over the training set.

Source: Qiu 2020, Neural Networks and Deep Learning, Section 7.4; names as `sklearn.preprocessing.MinMaxScaler`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_bools, check_numbers, check_whole
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

__all__ = ["MinMaxScale"]


class MinMaxScale(nn.Module):
    r"""Maps the smallest and largest training value of every feature to the ends of `feature_range`.

    .. math:: y = a + (b - a) (x - \min x) / (\max x - \min x)

    Missing values (NaN) are ignored during the fit and stay NaN. A constant feature is divided by 1, so it maps to a.

    Args:
        feature_range: Ends (a, b) of the range, a < b.
        clip: Whether to clamp values outside the training range to `feature_range`.
        feature_dim: Dimension that counts the features: -1 for tables (N, D), 1 for images (N, C, H, W).

    Raises:
        ValueError: if the range is empty; when fitting, if a value is infinite, a feature all missing, or shapes
            disagree.
        RuntimeError: if applied before it is fitted.

    Cost: 3 D float64 numbers of state. `forward` computes in float64 and returns the dtype of `x`.

    Example:
        >>> scale = MinMaxScale().fit(torch.tensor([[0.0], [4.0]]))
        >>> scale(torch.tensor([[1.0]]))
        tensor([[0.2500]])
    """

    def __init__(
        self, feature_range: tuple[float, float] = (0.0, 1.0), *, clip: bool = False, feature_dim: int = -1
    ) -> None:
        super().__init__()
        low, high = check_numbers(type(self).__name__, "feature_range", feature_range, 2, "(-inf, inf)")
        check_bools(type(self).__name__, clip=clip)
        check_whole(type(self).__name__, "feature_dim", feature_dim)
        if not low < high:
            raise ValueError(
                f"{type(self).__name__}(feature_range={feature_range}): the first end must be below the second."
            )
        self.feature_range, self.clip, self.feature_dim = (low, high), clip, feature_dim
        self.stats = Statistics("seen_min", "seen_max", "scale")

    @property
    def fitted(self) -> bool:
        """Whether it can be applied."""
        return self.scale.numel() > 0

    @property
    def num_features(self) -> int:
        """Number of features seen when fitting, 0 before."""
        return self.stats["seen_min"].numel()

    @property
    def data_min(self) -> Tensor:
        """Smallest training value of every feature, shape (D,), float64."""
        return self.stats["seen_min"]

    @property
    def data_max(self) -> Tensor:
        """Largest training value of every feature, shape (D,), float64."""
        return self.stats["seen_max"]

    @property
    def scale(self) -> Tensor:
        """Factor of every feature, shape (D,), float64."""
        return self.stats["scale"]

    def partial_fit(self, x: Tensor) -> "MinMaxScale":
        """Learns from one more batch, shape (N, ..., D) for `feature_dim=-1`."""
        rows = feature_rows(type(self).__name__, x, feature_dim=self.feature_dim, num_features=self.num_features)
        missing = rows.isnan()
        unseen = rows.new_full((1, rows.shape[1]), torch.inf)  # of a feature without values
        smallest = torch.cat([unseen, rows.masked_fill(missing, torch.inf)]).amin(dim=0)
        largest = torch.cat([-unseen, rows.masked_fill(missing, -torch.inf)]).amax(dim=0)
        return self._widen(smallest, largest)

    def merge(self, other: "MinMaxScale") -> "MinMaxScale":
        """Merges the statistics that `other` collected on other rows."""
        check_mergeable(self, other)
        return self._widen(other.data_min, other.data_max) if other.num_features else self

    def finalize(self) -> "MinMaxScale":
        """Ends the fit: the transform can be applied."""
        spread = self.data_max - self.data_min
        require_finite_fit(type(self).__name__, self.data_min.isfinite().double(), spread)
        low, high = self.feature_range
        scale = (high - low) / spread
        self.stats["scale"] = torch.where(scale.isinf(), high - low, scale)  # constant, or within 1e-308 of it
        return self

    def fit(self, batches: Tensor | Iterable[Tensor], *, across_ranks: bool = False) -> "MinMaxScale":
        """Fits anew in one pass over `batches` (a tensor is one batch); on all processes if `across_ranks`."""
        fit_batches(self, batches, across_ranks)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The scaled `x`, in its shape and floating dtype (integers give the default dtype)."""
        data_min, scale = self._learned(x)
        y = (x.double() - data_min) * scale + self.feature_range[0]
        return (y.clamp(*self.feature_range) if self.clip else y).to(output_dtype(x))

    def inverse(self, x: Tensor) -> Tensor:
        """The inverse of `forward`, except those it clipped."""
        data_min, scale = self._learned(x)
        return ((x.double() - self.feature_range[0]) / scale + data_min).to(output_dtype(x))

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"feature_range={self.feature_range}, clip={self.clip}, feature_dim={self.feature_dim}"

    def _widen(self, smallest: Tensor, largest: Tensor) -> "MinMaxScale":
        if self.num_features:
            smallest = torch.minimum(self.data_min, smallest.to(self.data_min.device))
            largest = torch.maximum(self.data_max, largest.to(self.data_max.device))
        self.stats.update({"seen_min": smallest, "seen_max": largest})
        self.stats.clear("scale")
        return self

    def _learned(self, x: Tensor) -> tuple[Tensor, Tensor]:
        require_fitted(type(self).__name__, self.scale)
        check_features(type(self).__name__, x, self.feature_dim, self.num_features)
        return to_feature_dim(self.data_min, x, self.feature_dim), to_feature_dim(self.scale, x, self.feature_dim)
