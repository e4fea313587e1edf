# SPDX-License-Identifier: Apache-2.0
"""The rectangles that CutMix pastes: by area, as in the paper, or by sides.

Source: Yun et al. 2019, arXiv:1905.04899, Algorithm A1; rounding and sides as in timm's `rand_bbox` and
`rand_bbox_minmax`.
"""

import torch
from torch import Tensor

from lightning_optkit.data._draws import Draws

__all__ = ["by_area", "by_sides"]


def by_area(draws: Draws, areas: Tensor, height: int, width: int) -> Tensor:
    """Rectangles (count, 4) of the given areas, relative to the image: uniform centers, cut at the border."""
    sides, places = areas.sqrt(), draws.uniform(len(areas), 2)
    spans = []
    for axis, size in enumerate((height, width)):
        cut, middle = (size * sides).long(), (size * places[:, axis]).long()
        spans += [(middle - cut // 2).clamp(min=0), (middle + (cut + 1) // 2).clamp(max=size)]
    return torch.stack(spans, dim=1)


def by_sides(draws: Draws, count: int, min_max: tuple[float, float], height: int, width: int) -> Tensor:
    """Rectangles (count, 4) inside the image, each side uniform from its least to its largest length."""
    places, spans = draws.uniform(count, 4), []
    for axis, size in enumerate((height, width)):
        least, most = (int(size * bound) for bound in min_max)
        cut = least + (places[:, 2 * axis] * max(most - least, 1)).long()
        start = (places[:, 2 * axis + 1] * (size - cut + 1)).long()
        spans += [start, start + cut]
    return torch.stack(spans, dim=1)
