# SPDX-License-Identifier: Apache-2.0
"""The measured steps of one fit: which they are, and what is kept from one to the next."""

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_optkit.callbacks.seams.drawn_weights import loss_of_drawn_weights
from lightning_optkit.callbacks.seams.lightning_private import accumulates
from lightning_optkit.callbacks.seams.losses_of_run import LossesOfRun
from lightning_optkit.callbacks.seams.measured_step import MeasuredStep
from lightning_optkit.callbacks.seams.measured_when import is_regular, may_count, may_probe, next_look
from lightning_optkit.callbacks.seams.modes_of_run import ModesOfRun
from lightning_optkit.callbacks.seams.probe import Probe, can_probe
from lightning_optkit.diagnostics._guard import Guarding
from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics.measure.parameters import StepMeasure
from lightning_optkit.diagnostics.measure.rows import EqualRows
from lightning_optkit.diagnostics.rules.outcome import outcome_of
from lightning_optkit.diagnostics.rules.zero_gradients import is_flat
from lightning_optkit.step.shards import reshard

__all__ = ["MeasuredSteps"]


class MeasuredSteps:
    """`begin` is called as the training starts, then `before_batch`, `take` and `close` around every batch.

    Args:
        seen: What is seen of the run; the checks are added to it.
        losses: The losses of its steps.
        every: Steps between the regular ones.
        probed_below: The progress of a run below which `training_step` is run again to probe it; 0: never.
        guard: What stands around what is done within a batch.
    """

    def __init__(self, seen: RunSeen, losses: LossesOfRun, every: int, probed_below: float, guard: Guarding) -> None:
        self._seen, self._losses, self._every, self._guard = seen, losses, every, guard
        self._probed_below = probed_below
        self.current: MeasuredStep | None = None  # that of this batch
        self.compares = False  # whether this batch is one after which processes are compared
        self.has_begun = False
        self.called: set[str] | None = None  # modules that every measured step called
        self.without_grad: set[str] = set()  # modules that one of them called under `torch.no_grad()`
        self.next_look = 0  # the step until which none is measured, if no layer changes its mode
        self.modes: ModesOfRun | None = None  # None if there is no layer with another mode for training
        self._rows = EqualRows(nn.Module())
        self._former: tuple[int, StepMeasure] | None = None
        self._alive: dict[tuple[str, int], list[Tensor]] = {}
        self._probe: Probe | None = None
        self._num_probes = 0
        self._other: tuple[Any, int] | None = None  # the batch of the probe before

    def begin(self, pl_module: pl.LightningModule) -> None:
        """Looks at the module before its first step."""
        self.has_begun = True
        with self._guard("the look at equal rows"):
            reshard(pl_module)  # the sanity check may have left parameters whole
            self._rows = EqualRows(pl_module)
        with self._guard("the look at modes"):
            modes = ModesOfRun(pl_module)
            self.modes = modes if modes.has_any else None
            self._seen.began_in_training = modes.is_training

    def plan_anew(self) -> None:
        """The planned length of the run may be another one."""
        self.next_look = 0

    def before_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins to measure if the batch ends with such a step; asked from `next_look` on, or if there are `modes`."""
        step = self._seen.steps
        has_changed = self.modes is not None and self.modes.is_due(step)
        if step > self.next_look:
            self.next_look = next_look(self._seen, self._every)
        if step < self.next_look and not has_changed:
            return
        # Others depend on what this process has seen, so no other process might come to compare.
        self.compares = is_regular(step, self._every)
        is_due = has_changed or self.compares or may_count(self._seen)
        is_probed = self._probed_below > 0 and may_probe(self._seen, self._num_probes)
        if not (is_due or is_probed) or (pl_module.automatic_optimization and accumulates(trainer)):
            return
        is_probed = is_probed and can_probe(trainer, pl_module) and self._learns_little()
        if is_due or is_probed:
            # The rules ask for the scale of layers in the first step alone.
            self.current = MeasuredStep(trainer, pl_module, step, self._former, step == 0, self._guard)
            with self._guard("the probe"):
                self._probe = Probe(trainer) if is_probed else None

    def take(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: tuple[Any, int]) -> None:
        """Adds what was measured in a batch that has ended with a step; its loss has been taken."""
        measured, probe = self.current, None
        if measured is None:
            return
        measured.end_of_forward()
        if self._probe is not None:
            self._num_probes += 1
            with self._guard("the probe"):
                probe = self._probe.measure(trainer, pl_module, batch, self._other, measured.rate)
            self._other = batch
        check = replace(measured.check(self._rows, self._alive, probe), returned=self._losses.of_batch())
        if check.returned == 0 and is_flat(check) and self._probed_below > 0 and can_probe(trainer, pl_module):
            with self._guard("the look at a loss of 0"):
                check = replace(check, of_drawn_weights=loss_of_drawn_weights(trainer, pl_module, batch))
        self._seen.take(check)
        self.called = measured.called if self.called is None else self.called & measured.called
        self.without_grad |= measured.without_grad

    def close(self) -> None:
        """Measures no longer; no-op the second time."""
        if self.current is not None:
            with self._guard("the end of a measured step"):
                self.current.close()
            self._former = (self._seen.steps - 1, self.current.norms) if self.current.is_taken else None
        self.current, self._probe, self.compares = None, None, False

    def _learns_little(self) -> bool:
        self._losses.fetch()
        self._seen.losses = self._losses.losses
        return outcome_of(self._seen).progress < self._probed_below  # unknown: let be
