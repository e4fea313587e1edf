# SPDX-License-Identifier: Apache-2.0
"""The public functions of `lightning_optkit.averaging.standalone`, under another import path."""

# A public path stays importable.
from lightning_optkit.averaging.standalone import (
    averages_of,
    protect_average,
    read_average,
    state_names,
    update_average_,
    update_tensors_,
)

__all__ = ["averages_of", "protect_average", "read_average", "state_names", "update_average_", "update_tensors_"]
