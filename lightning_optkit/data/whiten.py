# SPDX-License-Identifier: Apache-2.0
"""Decorrelates the features and scales them to variance 1 over the training set, by principal components.

Source: Qiu 2020, Neural Networks and Deep Learning, Section 7.4 (PCA); Bell & Sejnowski 1997, Vision Research 37 (ZCA);
names as `sklearn.decomposition.PCA(whiten=True)`.
Unlike in scikit-learn, a direction without variance gives 0, not normalized rounding noise.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_in, check_int, check_one_of, check_whole, shown
from lightning_optkit.data._moments import merge_moments, moments
from lightning_optkit.data._statistics import (
    Statistics,
    check_features,
    check_mergeable,
    feature_rows,
    fit_batches,
    output_dtype,
    require_finite_fit,
    require_fitted,
)

__all__ = ["Whiten"]


class Whiten(nn.Module):
    r"""Projects the centered features onto their principal directions and divides each by its standard deviation.

    .. math:: y = (x - \mu) V \Lambda^{-1/2} \quad\text{(pca)}, \qquad y = (x - \mu) V \Lambda^{-1/2} V^T
        \quad\text{(zca)}, \qquad \frac{1}{N-1} \sum_n (x_n - \mu)(x_n - \mu)^T = V \Lambda V^T

    "pca" orders the outputs by variance and can drop the last ones; "zca" stays as close to the input as possible.
    Batches are merged through the triangular factor R of the centered rows (R^T R is their scatter matrix), whose
    singular values keep twice the digits of the covariance's eigenvalues. The sign of a direction makes its largest
    entry positive.

    Args:
        method: "pca" or "zca".
        n_components: Number of directions kept by "pca", or the fraction of the variance to keep, in (0, 1). Default:
            all, that is min(N, D).
        eps: Added to every variance before dividing, in [0, inf); larger values amplify weak directions less.
        feature_dim: Dimension that counts the features: -1 for tables (N, D), 1 for images (N, C, H, W).

    Raises:
        ValueError: if an argument is outside its range; when fitting, if there is one row only, a value is missing or
            infinite, or shapes disagree.
        RuntimeError: if applied before it is fitted.

    Cost: 2 D^2 + 5 D float64 numbers of state; a QR factorization of (N + D, D) per training batch of N rows.
    `forward` computes in float64 and returns the dtype of `x`.

    Example:
        >>> whiten = Whiten("zca").fit(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]]))
        >>> whiten(torch.tensor([[1.0, 1.0]]))
        tensor([[0., 0.]])
        >>> whiten(torch.tensor([[0.0, 2.0]]))
        tensor([[-0.8660,  0.8660]])
    """

    def __init__(
        self,
        method: Literal["pca", "zca"] = "pca",
        *,
        n_components: int | float | None = None,
        eps: float = 0.0,
        feature_dim: int = -1,
    ) -> None:
        super().__init__()
        check_one_of(type(self).__name__, "method", method, ("pca", "zca"))
        if n_components is not None and method == "zca":
            raise ValueError(
                f"{type(self).__name__}(n_components={shown(n_components)}): zca keeps every direction; use "
                "method='pca'."
            )
        if isinstance(n_components, float):
            check_in(type(self).__name__, "n_components", n_components, "(0, 1)")
        elif n_components is not None:
            check_int(type(self).__name__, "n_components", n_components, minimum=1)
        check_whole(type(self).__name__, "feature_dim", feature_dim)
        self.method, self.n_components, self.feature_dim = method, n_components, feature_dim
        self.eps = check_in(type(self).__name__, "eps", eps, "[0, inf)")
        self.stats = Statistics("count", "origin", "offset", "m2", "factor", "components", "scale")

    @property
    def fitted(self) -> bool:
        """Whether it can be applied."""
        return self.stats["scale"].numel() > 0

    @property
    def num_features(self) -> int:
        """Number of features seen when fitting, 0 before."""
        return self.stats["origin"].numel()

    @property
    def mean(self) -> Tensor:
        """Mean of every feature, shape (D,), float64."""
        return self.stats["origin"] + self.stats["offset"]

    @property
    def components(self) -> Tensor:
        """Directions by decreasing variance, shape (K, D), float64, rows of length 1."""
        return self.stats["components"]

    @property
    def explained_variance(self) -> Tensor:
        """Variance along every direction (divided by N - 1) plus `eps`, shape (K,), float64."""
        return self.stats["scale"].square()

    def partial_fit(self, x: Tensor) -> "Whiten":
        """Learns from one more batch, shape (N, ..., D) for `feature_dim=-1`."""
        rows = feature_rows(type(self).__name__, x, feature_dim=self.feature_dim, num_features=self.num_features)
        if rows.isnan().any():
            raise ValueError(f"{type(self).__name__}(x=nan): a missing value has no direction; put Impute before.")
        summary = moments(rows)
        summary["factor"] = (rows - summary["origin"]) - summary["offset"]
        return self._absorb(summary)

    def merge(self, other: "Whiten") -> "Whiten":
        """Merges the statistics that `other` collected on other rows."""
        check_mergeable(self, other)
        return self._absorb(other.stats.named()) if other.num_features else self

    def finalize(self) -> "Whiten":
        """Ends the fit: the transform can be applied."""
        require_finite_fit(type(self).__name__, self.stats["count"], self.stats["m2"])
        num_rows = int(self.stats["count"][0])
        if num_rows < 2:
            raise ValueError(f"{type(self).__name__}(rows={num_rows}): variances need at least 2 training rows.")
        _, singular, components = torch.linalg.svd(self.stats["factor"], full_matrices=False)
        most = min(num_rows, self.num_features)
        kept = self._num_kept(singular[:most].square(), most)
        singular, components = singular[:kept], components[:kept]
        largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
        null = singular <= singular[0] * max(num_rows, self.num_features) * torch.finfo(torch.float64).eps
        variance = torch.where(null, 0.0, singular.square() / (num_rows - 1))
        self.stats.update({"components": components * largest.sign(), "scale": (variance + self.eps).sqrt()})
        return self

    def fit(self, batches: Tensor | Iterable[Tensor], *, across_ranks: bool = False) -> "Whiten":
        """Fits anew in one pass over `batches` (a tensor is one batch); on all processes if `across_ranks`."""
        fit_batches(self, batches, across_ranks)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The whitened `x`, in its floating dtype; `feature_dim` has K entries after "pca"."""
        scale = self._scale(x, self.num_features)
        rows = (x.double().movedim(self.feature_dim, -1) - self.stats["origin"]) - self.stats["offset"]
        y = (rows @ self.components.T) * torch.where(scale == 0, 0.0, 1 / scale)  # V Lambda^-1/2
        return self._placed(y @ self.components if self.method == "zca" else y, x)

    def inverse(self, x: Tensor) -> Tensor:
        """The inverse of `forward`, without the dropped directions."""
        scale = self._scale(x, self.components.shape[-1 if self.method == "zca" else 0])
        y = x.double().movedim(self.feature_dim, -1)
        rows = ((y @ self.components.T if self.method == "zca" else y) * scale) @ self.components
        return self._placed((rows + self.stats["offset"]) + self.stats["origin"], x)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"{self.method!r}, n_components={self.n_components}, eps={self.eps}, feature_dim={self.feature_dim}"

    def _absorb(self, summary: Mapping[str, Tensor]) -> "Whiten":
        ours = self.stats.named()
        factor = summary["factor"].to(ours["factor"].device)
        if self.num_features:
            between = (summary["origin"].to(factor.device) - ours["origin"]) + (
                summary["offset"].to(factor.device) - ours["offset"]
            )
            total = (ours["count"] + summary["count"].to(factor.device)).clamp(min=1)
            weight = (ours["count"] * summary["count"].to(factor.device) / total).sqrt()
            factor = torch.cat([ours["factor"], factor, (weight * between)[None]])
        self.stats.update(merge_moments(ours, summary))
        self.stats["factor"] = torch.linalg.qr(factor, mode="r").R
        self.stats.clear("components", "scale")
        return self

    def _num_kept(self, variance: Tensor, most: int) -> int:
        if isinstance(self.n_components, float):
            share = variance.cumsum(dim=0) / variance.sum().clamp(min=torch.finfo(torch.float64).tiny)
            return min(int((share <= self.n_components).sum()) + 1, most)
        if self.n_components is not None and self.n_components > most:
            raise ValueError(
                f"{type(self).__name__}(n_components={self.n_components}): the training set has only {most} directions."
            )
        return self.n_components or most

    def _scale(self, x: Tensor, num_features: int) -> Tensor:
        require_fitted(type(self).__name__, self.stats["scale"])
        check_features(type(self).__name__, x, self.feature_dim, num_features)
        return self.stats["scale"]

    def _placed(self, y: Tensor, x: Tensor) -> Tensor:
        return y.movedim(-1, self.feature_dim).to(output_dtype(x))
