# SPDX-License-Identifier: Apache-2.0
"""Latest weight averaging: the mean of the last few checkpoints.

Source: Kaddour 2022, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging",
arXiv:2209.14981, section 2.
"""

from dataclasses import dataclass

from lightning_optkit._checks import check_int
from lightning_optkit.step.rule import KeptInState

__all__ = ["LAWA"]


@dataclass(frozen=True)
class LAWA(KeptInState):
    """The mean of the last `k` snapshots of the weights, one taken every `every` optimizer steps.

    Unlike an EMA it forgets completely: weights older than `k * every` steps do not count. With fewer than `k`
    snapshots it is the mean of the existing ones. Snapshots are stored in a ring,
    `optimizer.state[p]["lawa_snapshot_0"]` to `["lawa_snapshot_<k-1>"]`, in the parameter's dtype, so every checkpoint
    contains them; the mean is computed in fp32 on demand. It is not part of the one-pass step: a separate pass copies
    one snapshot every `every` steps.

    Args:
        k: Number of snapshots, at least 1.
        every: Optimizer steps between snapshots, at least 1; the paper uses one epoch.
        start: First optimizer step, from 1, that is averaged.

    Raises:
        ValueError: for an argument out of range.

    Cost: `k` copies of the parameters (24 bytes per fp32 parameter with `k=6`); 8 bytes moved per snapshot.

    Example:
        >>> LAWA(k=6, every=100)
        LAWA(k=6, every=100, start=1)
    """

    k: int = 6
    every: int = 1
    start: int = 1

    def __post_init__(self) -> None:
        check_int(type(self).__name__, "k", self.k, minimum=1)
        check_int(type(self).__name__, "every", self.every, minimum=1)
        check_int(type(self).__name__, "start", self.start, minimum=1)

    @property
    def state_name(self) -> str:
        """Prefix of the names of its snapshots in `optimizer.state[p]`."""
        return "lawa"
