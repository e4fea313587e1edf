# SPDX-License-Identifier: Apache-2.0
"""Latest weight averaging: the mean of the last few checkpoints.

Source: Kaddour 2022, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging",
arXiv:2209.14981, section 2.
"""

from dataclasses import dataclass

from lightning_optkit._checks import check_int
from lightning_optkit.averaging._start import StartInterval, check_start, started_in_run
from lightning_optkit.step.average import KeptInState

__all__ = ["LAWA"]


@dataclass(frozen=True, repr=False)
class LAWA(KeptInState):
    """The average of the last `k` snapshots of the weights, one taken every `every` optimizer steps.

    Unlike an EMA it forgets completely: weights older than `k * every` steps do not count. With fewer than `k`
    snapshots it is the mean of the existing ones. Snapshots are stored in a ring,
    `optimizer.state[p]["lawa_snapshot_0"]` to `["lawa_snapshot_<k-1>"]`, in the parameter's dtype, so every checkpoint
    contains them; the mean is computed in fp32 on demand. It is not part of the one-pass step: a separate pass copies
    one snapshot every `every` steps.

    Args:
        k: Number of snapshots, at least 1.
        every: Optimizer steps between snapshots, at least 1; the paper uses one epoch.
        start: First optimizer step, from 1, that is averaged; or a float in (0, 1], a fraction of the run.
        start_interval: "epoch": `start` counts epochs, from 1, and the first step of that epoch is the first one.

    Raises:
        ValueError: for an argument out of range.

    Cost: `k` copies of the parameters (24 bytes per fp32 parameter with `k=6`); 8 bytes moved per snapshot.

    Example:
        >>> LAWA(k=6, every=100)
        LAWA(k=6, every=100, start=1)
    """

    k: int = 6
    every: int = 1
    start: int | float = 1
    start_interval: StartInterval = "step"

    def __post_init__(self) -> None:
        check_int(type(self).__name__, "k", self.k, minimum=1)
        check_int(type(self).__name__, "every", self.every, minimum=1)
        check_start(type(self).__name__, self.start, self.start_interval)

    def __repr__(self) -> str:
        # The name of its state in a checkpoint, so that it must not change with every new argument.
        interval = "" if self.start_interval == "step" else f", start_interval={self.start_interval!r}"
        return f"{type(self).__name__}(k={self.k!r}, every={self.every!r}, start={self.start!r}{interval})"

    def for_run(self, total_steps: float, steps_per_epoch: float | None = None) -> "LAWA":
        """The same average with `start` as an optimizer step; see `SWA.for_run`."""
        return started_in_run(self, total_steps, steps_per_epoch)

    @property
    def state_name(self) -> str:
        """Prefix of the names of its snapshots in `optimizer.state[p]`."""
        return "lawa"
