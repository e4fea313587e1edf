# SPDX-License-Identifier: Apache-2.0
"""Every private name of torchmetrics that this package uses; nowhere else is there one.

`tests/test_private_names.py` looks for others, and names those that an installed torchmetrics does not have.
"""

from torchmetrics import Metric


def state_names(metric: Metric) -> tuple[str, ...]:
    """Attributes that an update changes: what is accumulated, how often, and the last result.

    `metric_state` leaves out the last two; without them a result that is cached would outlive the state that it is of.
    """
    return (*metric._defaults, "_update_count", "_computed")
