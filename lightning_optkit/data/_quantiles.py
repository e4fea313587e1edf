# SPDX-License-Identifier: Apache-2.0
"""Quantiles of every feature in one pass with bounded memory, exact for few rows.

All rows are kept until there are more than `exact_rows`. Then they are sorted by feature and every other one is kept
with twice the weight; the same happens to rows of weight 2, 4, ... So at most `exact_rows` rows of each weight are
stored. N rows are halved L = ceil(log2(N / exact_rows)) times, and the rank of a quantile is off by at most ceil(L / 2)
/ exact_rows of N: zero up to `exact_rows` rows, 0.05 % for a billion rows at 16384.

Source: Munro & Paterson 1980, Theoretical Computer Science 12 (sort and keep every other element).
Differs from the paper: the lower and the upper element of each pair are kept alternately by level, so errors of
neighboring levels have opposite signs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["EXACT_ROWS", "merge_samples", "quantiles", "sample_of"]

EXACT_ROWS = 16384


def sample_of(rows: Tensor) -> dict[str, Tensor]:
    """A sample that contains each of `rows`, shape (N, D), float64, once. NaN is ignored."""
    return {"sample": rows, "weight": rows.new_ones(len(rows))}


def merge_samples(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], exact_rows: int) -> dict[str, Tensor]:
    """The sample of both sets of rows together. Either may be empty."""
    device = ours["sample"].device
    sides = [side for side in (ours, theirs) if side["weight"].numel()]
    if not sides:
        return {"sample": theirs["sample"].to(device), "weight": theirs["weight"].to(device)}
    sample = torch.cat([side["sample"].to(device) for side in sides])
    weight = torch.cat([side["weight"].to(device) for side in sides])
    return _compact(sample, weight, exact_rows)


def _compact(sample: Tensor, weight: Tensor, exact_rows: int) -> dict[str, Tensor]:
    level = 0
    while 2.0**level <= float(weight.max()):
        here = weight == 2.0**level
        if int(here.sum()) > exact_rows:
            kept = sample[here].sort(dim=0).values[level % 2 :: 2]  # NaN sorts last
            sample = torch.cat([sample[~here], kept])
            weight = torch.cat([weight[~here], weight.new_full((len(kept),), 2.0 ** (level + 1))])
        level += 1
    return {"sample": sample, "weight": weight}


def quantiles(statistics: Mapping[str, Tensor], probabilities: list[float]) -> Tensor:
    """Linearly interpolated quantiles, shape (len(probabilities), D), as `numpy.nanquantile`.

    A row of weight w counts as w equal rows. A feature without values gives NaN.
    """
    values, order = statistics["sample"].sort(dim=0)
    weight = torch.where(values.isnan(), 0.0, statistics["weight"][order])
    cumulative = weight.cumsum(dim=0).T.contiguous()  # (D, M)
    last_rank = (cumulative[:, -1] - 1).clamp(min=0)  # ranks count from 0
    position = torch.outer(last_rank, last_rank.new_tensor(probabilities))  # (D, Q)
    lower, upper = position.floor(), position.ceil()
    values = values.T.contiguous()
    last = values.shape[1] - 1
    below, above = (
        values.gather(1, torch.searchsorted(cumulative, rank, right=True).clamp(max=last)) for rank in (lower, upper)
    )
    return (below + (above - below) * (position - lower)).T
