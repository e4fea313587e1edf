# SPDX-License-Identifier: Apache-2.0
"""Count, mean and sum of squared deviations of every feature, in mergeable form.

The mean is kept as `origin + offset`, where `origin` is one of the values: `x - origin` is exact for values close
together, so an offset of 1e9 loses no precision, and a constant feature has a deviation of exactly zero.

Source: Chan, Golub & LeVeque 1979, Stanford STAN-CS-79-773 (pairwise merging).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["MOMENTS", "merge_moments", "moments"]

MOMENTS = ("count", "origin", "offset", "m2")


def moments(rows: Tensor) -> dict[str, Tensor]:
    """Moments of `rows`, shape (N, D), float64, without the NaN in them; each of shape (D,)."""
    valid = ~rows.isnan()
    count = valid.sum(dim=0).double()
    if len(rows):
        first_valid = valid.to(torch.uint8).argmax(dim=0, keepdim=True)
        origin = rows.gather(0, first_valid)[0].nan_to_num(nan=0.0)
    else:
        origin = torch.zeros_like(count)
    deviation = torch.where(valid, rows - origin, 0.0)
    offset = deviation.sum(dim=0) / count.clamp(min=1)
    m2 = torch.where(valid, deviation - offset, 0.0).square().sum(dim=0)
    return {"count": count, "origin": origin, "offset": offset, "m2": m2}


def merge_moments(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Moments of both sets of rows together. Either may be empty."""
    a, b = ({name: side[name] for name in MOMENTS} for side in (ours, theirs))
    if a["count"].numel() == 0 or b["count"].numel() == 0:
        return b if a["count"].numel() == 0 else a
    device = a["count"].device
    b = {name: value.to(device) for name, value in b.items()}

    count = a["count"] + b["count"]
    share = b["count"] / count.clamp(min=1)
    distance = (b["origin"] - a["origin"]) + (b["offset"] - a["offset"])  # mean_b - mean_a
    merged = {
        "count": count,
        "origin": a["origin"],
        "offset": a["offset"] + distance * share,
        "m2": a["m2"] + b["m2"] + distance.square() * a["count"] * share,
    }
    return {
        name: torch.where(a["count"] == 0, b[name], torch.where(b["count"] == 0, a[name], value))
        for name, value in merged.items()
    }
