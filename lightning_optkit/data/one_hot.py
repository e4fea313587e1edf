# SPDX-License-Identifier: Apache-2.0
"""One column per category of every feature, 1 where it is that category.

Source: Qiu 2020, Neural Networks and Deep Learning, Section 7.4; names as `sklearn.preprocessing.OneHotEncoder`.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_one_of, check_tensor
from lightning_optkit._torch_private import assert_async
from lightning_optkit.data._categories import CATEGORIES, categories_of, merge_categories
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

__all__ = ["OneHot"]

_IGNORE = "handle_unknown='ignore' gives zeros."
_NAN_CATEGORY = torch.inf  # represents NaN, since NaN != NaN and training values are finite


class OneHot(nn.Module):
    """Encodes every feature by the categories it had in the training set, in increasing order, NaN last.

    Args:
        handle_unknown: How `forward` handles an unknown category: "error" raises (one device synchronization per batch;
            compiled or exported, an assertion in the graph), "ignore" gives zeros.
        drop: Categories without a column, for models that need non-redundant columns: the first of every feature
            ("first"), or of those with exactly two ("if_binary").

    Raises:
        ValueError: if an argument is not one of its choices; when fitting, if a value is infinite or shapes disagree;
            when applied, for an unknown category under "error".
        RuntimeError: if applied before it is fitted.

    Cost: 4 float64 numbers of state per category. Category values are compared in float64.

    Example:
        >>> encode = OneHot(handle_unknown="ignore").fit(torch.tensor([[3, 0], [7, 0]]))
        >>> encode(torch.tensor([[7, 0], [5, 0]]))
        tensor([[0., 1., 1.],
                [0., 0., 1.]])
        >>> encode.inverse(torch.tensor([[0.0, 1.0, 1.0]]))
        tensor([[7., 0.]], dtype=torch.float64)
    """

    def __init__(
        self,
        *,
        handle_unknown: Literal["error", "ignore"] = "error",
        drop: Literal["first", "if_binary"] | None = None,
    ) -> None:
        super().__init__()
        check_one_of(type(self).__name__, "handle_unknown", handle_unknown, ("error", "ignore"))
        check_one_of(type(self).__name__, "drop", drop, (None, "first", "if_binary"))
        self.handle_unknown, self.drop = handle_unknown, drop
        self.stats = Statistics("features", *CATEGORIES, "kept")

    @property
    def fitted(self) -> bool:
        """Whether it can be applied."""
        return self.stats["kept"].numel() > 0

    @property
    def num_features(self) -> int:
        """Number of features seen when fitting, 0 before."""
        return self.stats["features"].numel()

    @property
    def categories(self) -> list[Tensor]:
        """Categories of every feature in the order of the columns, float64."""
        value = self.stats["value"]
        value = torch.where(value == _NAN_CATEGORY, torch.nan, value)
        return [value[self.stats["column"] == feature] for feature in range(self.num_features)]

    def partial_fit(self, x: Tensor) -> "OneHot":
        """Learns from one more batch, shape (N, ..., D), integer, boolean or floating."""
        rows = feature_rows(type(self).__name__, x, num_features=self.num_features)
        if not x.is_floating_point() and x.numel() and (rows.abs() > 2**53).any():
            raise ValueError(
                f"{type(self).__name__}(x=2**53 or more): such integers are not exact in float64; number the "
                "categories."
            )
        self.stats["features"] = torch.ones(rows.shape[1])
        self.stats.update(merge_categories(self.stats.named(), categories_of(rows.nan_to_num(nan=_NAN_CATEGORY))))
        self.stats.clear("kept")
        return self

    def merge(self, other: "OneHot") -> "OneHot":
        """Merges the statistics that `other` collected on other rows."""
        check_mergeable(self, other)
        if other.num_features:
            self.stats["features"] = other.stats["features"]
            self.stats.update(merge_categories(self.stats.named(), other.stats.named()))
            self.stats.clear("kept")
        return self

    def finalize(self) -> "OneHot":
        """Ends the fit: the transform can be applied."""
        require_finite_fit(type(self).__name__, self.stats["occurrences"])
        column = self.stats["column"].long()
        if self.drop is None:
            self.stats["kept"] = torch.ones_like(self.stats["column"])
        else:
            first = torch.cat([column.new_ones(1, dtype=torch.bool), column[1:] != column[:-1]])
            droppable = self.drop == "first" or (column.bincount() == 2)[column]
            self.stats["kept"] = (~(first & droppable)).double()
        return self

    def fit(self, batches: Tensor | Iterable[Tensor], *, across_ranks: bool = False) -> "OneHot":
        """Fits anew in one pass over `batches` (a tensor is one batch); on all processes if `across_ranks`."""
        fit_batches(self, batches, across_ranks)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Zeros and ones, shape (N, ..., K), in the floating dtype of `x` (integers give the default dtype)."""
        require_fitted(type(self).__name__, self.stats["kept"])
        check_features(type(self).__name__, x, -1, self.num_features)
        values = x.double()
        unseen = -_NAN_CATEGORY  # replaces an infinite value: never a category
        values = torch.where(values.isnan(), _NAN_CATEGORY, values.masked_fill(values.isinf(), unseen))
        column = self.stats["column"].long()
        hit = values.index_select(-1, column) == self.stats["value"]
        if self.handle_unknown == "error":
            self._require_known(x, hit)
        return hit[..., self.stats["kept"] > 0].to(output_dtype(x)) if self.drop else hit.to(output_dtype(x))

    def inverse(self, x: Tensor) -> Tensor:
        """Categories, shape (N, ..., D), float64, of the largest entries; all zeros give the dropped one, or NaN."""
        kept = self.stats["kept"] > 0
        require_fitted(type(self).__name__, self.stats["kept"])
        check_tensor(f"{type(self).__name__}.inverse", "x", x, "real")
        if x.shape[-1:].numel() != int(kept.sum()) or x.dim() == 0:
            raise ValueError(
                f"{type(self).__name__}.inverse(x.shape={tuple(x.shape)}): x must have {int(kept.sum())} columns."
            )
        entries = x.new_zeros(*x.shape[:-1], len(kept), dtype=torch.float64)
        entries[..., kept] = x.double()
        decoded = []
        for feature, categories in enumerate(self.categories):
            here = self.stats["column"] == feature
            largest, winner = entries[..., here].max(dim=-1)
            value = categories[winner]
            if bool(kept[here].all()):
                decoded.append(torch.where(largest > 0, value, torch.nan))
            else:
                decoded.append(torch.where(largest > 0, value, categories[0]))
        return torch.stack(decoded, dim=-1)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"handle_unknown={self.handle_unknown!r}, drop={self.drop!r}"

    def _require_known(self, x: Tensor, hit: Tensor) -> None:
        if torch.compiler.is_compiling():  # also when exporting: the graph's assertion cannot name the category
            known = hit.sum() == x.numel()
            assert_async(known, f"{type(self).__name__}(x): must hold categories of the training set only; {_IGNORE}")
        elif int(hit.sum()) != x.numel():
            self._refuse_unknown(x, hit)

    def _refuse_unknown(self, x: Tensor, hit: Tensor) -> None:
        column = self.stats["column"].long()
        for feature in range(self.num_features):
            unknown = ~hit[..., column == feature].any(dim=-1)
            if unknown.any():
                value = x[..., feature][unknown][0].item()
                raise ValueError(
                    f"{type(self).__name__}(x[..., {feature}]={value}): not a category of the training set; {_IGNORE}"
                )
