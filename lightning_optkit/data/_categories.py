# SPDX-License-Identifier: Apache-2.0
"""Counts of the distinct values of every feature: a sorted list of (column, value, occurrences).

Memory grows with the number of distinct values, so this is for categories, not for measurements.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["CATEGORIES", "categories_of", "merge_categories", "most_frequent"]

CATEGORIES = ("column", "value", "occurrences")


def categories_of(rows: Tensor) -> dict[str, Tensor]:
    """Distinct values of `rows`, shape (N, D), float64, without the NaN in them."""
    column = torch.arange(rows.shape[1], dtype=rows.dtype, device=rows.device).expand_as(rows)
    valid = ~rows.isnan()
    return _grouped(column[valid], rows[valid], rows.new_ones(int(valid.sum())))


def merge_categories(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Distinct values of both sets of rows together. Either may be empty."""
    device = ours["value"].device
    column, value, occurrences = (torch.cat([ours[name], theirs[name].to(device)]) for name in CATEGORIES)
    return _grouped(column, value, occurrences)


def _grouped(column: Tensor, value: Tensor, occurrences: Tensor) -> dict[str, Tensor]:
    pairs, group = torch.unique(torch.stack([column, value], dim=1), dim=0, return_inverse=True)
    summed = occurrences.new_zeros(len(pairs)).index_add_(0, group, occurrences)
    return {"column": pairs[:, 0].contiguous(), "value": pairs[:, 1].contiguous(), "occurrences": summed}


def most_frequent(statistics: Mapping[str, Tensor], num_features: int) -> Tensor:
    """The most frequent value of every feature, shape (D,): the smallest in case of a tie, NaN without values."""
    column, value, occurrences = (statistics[name] for name in CATEGORIES)
    column = column.long()
    most = occurrences.new_zeros(num_features).scatter_reduce_(0, column, occurrences, "amax")
    smallest = value.new_full((num_features,), torch.inf)
    winners = occurrences == most[column]
    smallest.scatter_reduce_(0, column[winners], value[winners], "amin")
    return smallest.masked_fill(most == 0, torch.nan)
