# SPDX-License-Identifier: Apache-2.0
"""Every private name of torchmetrics that this package uses; no other file uses one.

`tests/test_private_names.py` looks for others, and names those that an installed torchmetrics lacks.
"""

from torchmetrics import Metric


def state_names(metric: Metric) -> tuple[str, ...]:
    """Attributes that an update changes: the accumulated values, the count, and the cached result.

    `metric_state` omits the last two; without them a cached result would outlive its state.
    """
    return (*metric._defaults, "_update_count", "_computed")


def count_update(metric: Metric) -> None:
    """Marks the metric as updated, as its state says: `compute` warns of one that is not."""
    metric._update_count, metric._computed = max(metric._update_count, 1), None
