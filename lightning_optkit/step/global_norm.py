# SPDX-License-Identifier: Apache-2.0
"""The norm of all gradients of a step, over segments and processes, for a step on the host."""

from collections.abc import Sequence

import torch

from lightning_optkit.step.planning import Segment
from lightning_optkit.step.shards import reduce_sum_

__all__ = ["global_norm"]


def global_norm(bound: Sequence[Segment], scale: float) -> float:
    """L2 norm of all gradients, times `scale`; NaN if an element is not finite."""
    squares = nonfinite = 0.0
    for segment in bound:
        sums: Sequence[float] = segment.norm()
        if segment.process_groups:
            here = torch.tensor(sums, dtype=torch.float64, device=segment.entries[0].param.device)
            sums = reduce_sum_(here, segment.process_groups).tolist()
        squares, nonfinite = squares + sums[0], nonfinite + sums[1]
    return float("nan") if nonfinite > 0 else float(scale * squares**0.5)
