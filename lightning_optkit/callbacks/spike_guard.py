# SPDX-License-Identifier: Apache-2.0
"""Drops bad batches, and brings broken weights back to where they were sound."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_optkit._checks import check_bools, check_in, check_int, check_one_of, check_state
from lightning_optkit._norms import total_norm
from lightning_optkit._torch_private import supports_amp_scaling
from lightning_optkit.callbacks._training_state import TrainingState, copy_state, restore_state, still_fits
from lightning_optkit.callbacks.grokfast import Grokfast
from lightning_optkit.callbacks.look_sam import LookSAM
from lightning_optkit.callbacks.lookahead import Lookahead
from lightning_optkit.callbacks.schedule_free_wrapper import ScheduleFreeWrapper
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_packages import is_a, loss_scaler
from lightning_optkit.callbacks.seams.lowered_rates import LoweredRates
from lightning_optkit.callbacks.seams.module_state import Buffers
from lightning_optkit.callbacks.seams.refusals import refuse_manual_optimization, refuse_split_parameters
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.callbacks.seams.steps import gradients_of
from lightning_optkit.diagnostics.spike_detector import SpikeDetector, SpikeEvent

__all__ = ["SpikeGuard"]

_COPIES = 2  # the older one is used if the run breaks again soon
_UNNOTICED = 4  # steps that may have done harm before the first loss that is too high
_NOT_FINITE = 20  # steps in a row, without a sound state, after which nothing will be trained
_LIGHTNINGS = (StochasticWeightAveraging, getattr(lightnings, "WeightAveraging", StochasticWeightAveraging))
_WITH_WEIGHTS = (Grokfast, LookSAM, Lookahead, ScheduleFreeWrapper, *_LIGHTNINGS)


class SpikeGuard(FitCallback):
    """Drops batches whose loss and gradient are far off, and undoes steps that broke the weights.

    Before each step, loss and gradient norm (before clipping) are judged by `SpikeDetector`. A spike is not stepped on.
    If losses stay too high, it is the weights that are broken, not the batch: weights, optimizer state, averages and
    the histories of clips return, bit for bit, to a copy that was taken before a step whose loss was normal; the
    batches since are dropped, and the learning rate grows to its value over `rewarm` steps. The older of two copies is
    used where the newer one is of the last four steps before losses rose, and if the run is soon broken again; then
    patience doubles, triples and so on. After `max_rollbacks` without a new copy the run stops. Where there is no copy,
    as at the start, batches that are not finite are dropped, but not 20 in a row.

    Schedules and counts of batches go on. All processes decide alike, from the mean of their losses. Infinite gradients
    of a finite loss remain a loss scaler's, if there is one. Windows, copies and positions are part of the checkpoint,
    so a resumed run decides as one that was not stopped.

    Attributes:
        events: A `SpikeEvent` for each batch that was dropped or shrunk, and each rollback, of the current or last fit.

    Args:
        action: "skip" drops a bad batch; "shrink" scales its gradient to the usual norm, unless it is not finite.
        rollback: Keep copies, and return to one of them. False: only batches are judged.
        every: Steps from one copy to the next, at least 1.
        rewarm: Steps over which the learning rate grows after a rollback, at least 0.
        max_rollbacks: Rollbacks without a new copy in between before the run stops, at least 1.
        threshold: Of a spike, in (0, inf); see `SpikeDetector`.
        patience: With losses that are too high, in (0, inf): 3 spikes, or some 20 losses a little too high.
        window: Steps that are remembered, at least 64.
        warmup: Steps before the first judgment, at least 10.
        verbose: Print each event.

    Raises:
        ValueError: for an argument out of range; when the fit starts, with manual optimization, with LBFGS, for a
            strategy that splits parameters, and with `rollback` beside callbacks that keep weights or gradients of
            their own (`Lookahead`, `Grokfast`, `LookSAM`, `ScheduleFreeWrapper`, Lightning's averages); during a fit,
            when 20 steps in a row, or all of a shorter run, are not finite and there is no state to return to.

    Cost: a pass over the gradients and a synchronization with the device per step; two copies of weights and optimizer
    state in memory and in each checkpoint.

    Source: after the practice of Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, section 5.1 (restart before the
    spike, drop the batches), without its 100 steps by hand.

    Example:
        >>> trainer = pl.Trainer(callbacks=[SpikeGuard()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        action: Literal["skip", "shrink"] = "skip",
        *,
        rollback: bool = True,
        every: int = 10,
        rewarm: int = 10,
        max_rollbacks: int = 5,
        threshold: float = 3.3,
        patience: float = 3.0,
        window: int = 256,
        warmup: int = 64,
        verbose: bool = True,
    ) -> None:
        owner = type(self).__name__
        check_one_of(owner, "action", action, ("skip", "shrink"))
        check_bools(owner, rollback=rollback, verbose=verbose)
        self.action, self.rollback, self.verbose = action, rollback, verbose
        self.every = check_int(owner, "every", every, minimum=1)
        self.rewarm = check_int(owner, "rewarm", rewarm, minimum=0)
        self.max_rollbacks = check_int(owner, "max_rollbacks", max_rollbacks, minimum=1)
        self.threshold = check_in(owner, "threshold", threshold, "(0, inf)")
        self.patience = check_in(owner, "patience", patience, "(0, inf)")
        self.window = check_int(owner, "window", window, minimum=64)
        self.warmup = check_int(owner, "warmup", warmup, minimum=10)
        self.events: list[SpikeEvent] = []
        self._begin()

    def _begin(self) -> None:
        self._detector = self._new_detector()
        self._copies: deque[TrainingState] = deque(maxlen=_COPIES)
        self._window: list[Tensor] = []  # losses of the batches that are accumulated
        self._rollbacks = 0  # since the last copy
        self._since_copy: int | None = None
        self._calm = 0  # steps before the last one that followed normal losses only
        self._rewarming: int | None = None  # steps since a rollback
        self._rates = LoweredRates()
        self._buffers: Buffers | None = None  # running statistics before the batches of a step
        self._is_stuck = False  # said so

    def _new_detector(self) -> SpikeDetector:
        return SpikeDetector(self.window, self.threshold, self.patience, self.warmup)

    def state_dict(self) -> dict[str, Any]:
        """Windows, copies, and the position in a rollback."""
        return {
            "detector": self._detector.state_dict(),
            "copies": [vars(kept) for kept in self._copies],
            "counts": [self._rollbacks, self._since_copy, self._rewarming],
            "calm": self._calm,
            "events": [asdict(event) for event in self.events],
            "window": list(self._window),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state."""
        owner = type(self).__name__
        kinds: dict[str, Any] = dict(detector=dict, copies=list, counts=list, events=list, window=list)
        state = check_state(owner, state_dict, **kinds)
        try:
            detector = self._new_detector()
            detector.load_state_dict(state["detector"])
            of_copy: dict[str, Any] = dict(step=int, weights=dict, optimizers=list, callbacks=dict)
            copies = [TrainingState(**check_state(owner, kept, **of_copy)) for kept in state["copies"]]
            events = [SpikeEvent(**event) for event in state["events"]]
            rollbacks, since_copy, rewarming = (
                count if count is None else check_int(owner, "counts", count, minimum=0) for count in state["counts"]
            )
            calm = check_int(owner, "calm", state.get("calm", 0), minimum=0)  # no older version has it
            window = [loss.detach() for loss in state["window"]]
        except Exception as error:
            raise ValueError(
                f"{owner}.load_state_dict(state_dict=...): must be a state that {owner} saved; {error}"
            ) from error
        self._detector, self._copies, self.events = detector, deque(copies, maxlen=_COPIES), events
        self._window, self._since_copy, self._rewarming = window, since_copy, rewarming
        self._rollbacks, self._calm = rollbacks or 0, calm
        self._detector.patience = self.patience * (1 + self._rollbacks)

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        owner = type(self).__name__
        refuse_split_parameters(self, trainer)
        refuse_manual_optimization(self, pl_module, "SpikeGuard must know which loss belongs to which step")
        others = [other for kind in _WITH_WEIGHTS for other in callbacks_of(trainer, kind)]
        for other in others if self.rollback else ():
            raise ValueError(
                f"{owner}(rollback=True): {type(other).__name__} keeps weights or gradients of its own, which would "
                f"not return; pass rollback=False{' or take ok.WeightAveraging' * is_a(other, *_LIGHTNINGS)}."
            )
        self._begin()
        self.events = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise ValueError(f"{type(self).__name__}(...): LBFGS evaluates many losses in a step.")
        self._rates = LoweredRates()
        self._override(trainer.strategy, "optimizer_step", self._rates.restored_after(trainer.strategy.optimizer_step))
        self._at_end(self._rates.restore)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._window:
            self._buffers = Buffers(pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        scaler = loss_scaler(trainer)
        scale = 1.0 if scaler is None else scaler.get_scale()
        self._window.append(loss.detach().float() * (trainer.accumulate_grad_batches / scale))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        grads = gradients_of(optimizer)
        if not grads or not self._window:
            self._window = []  # losses without gradients are no part of the next step
            return
        loss, norm = self._measured(trainer, optimizer, grads)
        if loss_scaler(trainer) is not None and math.isfinite(loss) and not math.isfinite(norm):
            return  # the gradients overflowed: the scaler skips the step and lowers its scale
        verdict = self._detector.judge(loss, norm)
        if verdict == "broken":
            self._leave(trainer, pl_module, optimizer, loss, norm)
        elif verdict == "fine":
            self._go_on(trainer, pl_module, loss, norm)
        elif self.action == "shrink" and math.isfinite(norm):
            self._shrink(trainer, grads, loss, norm)
        else:
            self._detector.reject(loss, norm)
            self._note(SpikeEvent(Run(trainer).step, "skip", loss, norm))
            self._drop(trainer, optimizer)
        self._rewarm(optimizer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = Run(trainer).step
        if steps and self._not_finite_before(steps) == steps:
            raise ValueError(self._why_untrained())

    # --- implementation ---

    def _measured(self, trainer: pl.Trainer, optimizer: Optimizer, grads: list[Tensor]) -> tuple[float, float]:
        """Mean loss of the accumulated batches and of all processes, and the norm of the gradients."""
        scaler = loss_scaler(trainer)
        dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
        norm = total_norm(dense)
        if scaler is not None and supports_amp_scaling(optimizer):  # it has not been divided yet
            norm = norm / scaler.get_scale()
        loss = torch.stack(self._window).mean()
        self._window = []
        both = trainer.strategy.reduce(torch.stack([loss, norm.to(loss)]), reduce_op="mean")
        measured, of_gradients = both.tolist()
        return measured, of_gradients

    def _go_on(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: float, norm: float) -> None:
        """A step that is taken. Before a normal one, the weights are sound, and may be copied."""
        was_calm = self._detector.is_calm
        self._detector.accept(loss, norm)
        if not self.rollback:
            return
        if was_calm:
            self._calm = Run(trainer).step
        due = self._since_copy is None or self._since_copy >= self.every
        if due and self._detector.is_calm:
            self._copies.append(copy_state(trainer, pl_module, self._buffers))
            self._since_copy, self._rollbacks, self._detector.patience = 0, 0, self.patience
        self._since_copy = (self._since_copy or 0) + 1

    def _leave(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer, loss: float, norm: float
    ) -> None:
        """Leaves high losses behind: returns to a copy, stops at the limit, or takes them for the new level."""
        copies, step = [kept for kept in self._copies if still_fits(trainer, kept)], Run(trainer).step
        if not copies:
            self._detector = self._new_detector()
            if math.isfinite(loss) and math.isfinite(norm):
                self._note(SpikeEvent(step, "accept", loss, norm))
            else:
                self._drop(trainer, optimizer)
                self._say_stuck(SpikeEvent(step, "skip", loss, norm))
                if self._not_finite_before(step + 1) >= _NOT_FINITE:
                    raise ValueError(self._why_untrained())
            return
        is_sound = self._calm - copies[-1].step >= _UNNOTICED
        kept = copies[-1] if self._rollbacks == 0 and is_sound else copies[0]
        self._drop(trainer, optimizer)
        restore_state(trainer, pl_module, kept)
        self._detector.restart()
        if self._rollbacks >= self.max_rollbacks:
            trainer.should_stop = True
            self._note(SpikeEvent(step, "stop", loss, norm, kept.step))
            return
        self._rollbacks += 1
        self._detector.patience = self.patience * (1 + self._rollbacks)  # a wrong rollback must not cause the next one
        self._since_copy, self._rewarming = 0, 0 if self.rewarm else None
        self._note(SpikeEvent(step, "rollback", loss, norm, kept.step))

    def _drop(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """No gradients, no step: neither weights nor moments nor counts change; nor do running statistics."""
        scaler = loss_scaler(trainer)
        if scaler is not None and supports_amp_scaling(optimizer):
            scaler.unscale_(optimizer)  # torch's scaler fails on a step for which it has seen no gradient at all
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = None
        if self._buffers is not None:
            self._buffers.restore()

    def _shrink(self, trainer: pl.Trainer, grads: list[Tensor], loss: float, norm: float) -> None:
        usual = self._detector.usual
        if usual is not None and norm > usual[1]:
            for grad in grads:
                grad.mul_(usual[1] / norm)
        self._detector.reject(loss, norm)
        self._note(SpikeEvent(Run(trainer).step, "shrink", loss, norm))

    def _rewarm(self, optimizer: Optimizer) -> None:
        """Lowers the rate of the step that follows, soon after a rollback."""
        if self._rewarming is not None and gradients_of(optimizer):
            self._rewarming += 1
            self._rates.lower(optimizer, self._rewarming / (self.rewarm + 1))
            if self._rewarming >= self.rewarm:
                self._rewarming = None

    def _note(self, event: SpikeEvent) -> None:
        self.events.append(event)
        if self.verbose or event.action == "stop":
            say: Callable[[str], object] = rank_zero_warn if event.action == "stop" else rank_zero_info
            say(f"{type(self).__name__}: {self._text(event)}")

    def _not_finite_before(self, step: int) -> int:
        """How many steps in a row before this one were dropped since they were not finite."""
        count = 0
        for event in reversed(self.events):
            is_finite = math.isfinite(event.loss) and math.isfinite(event.norm)
            if event.action != "skip" or is_finite or event.step != step - 1 - count:
                break
            count += 1
        return count

    def _why_untrained(self) -> str:
        last = self.events[-1]
        count = self._not_finite_before(last.step + 1)
        return (
            f"{type(self).__name__}: loss and gradient norm of step {last.step} are {last.loss:.3g} and "
            f"{last.norm:.3g}, and {count} in a row were not finite; there is no sound state to return to: "
            "add GradientHealth or run `optkit doctor`, which name the layer where it begins."
        )

    def _say_stuck(self, event: SpikeEvent) -> None:
        """Once, and although not verbose: each such step is lost, and the run may end of it."""
        self._note(event)
        if not self._is_stuck:
            rank_zero_warn(
                f"{type(self).__name__}: step {event.step}: loss {event.loss:.3g}, gradient norm {event.norm:.3g}, as "
                "in the steps before; there is no sound state to return to, so such batches are dropped, and the run "
                f"ends if {_NOT_FINITE} in a row are; run with GradientHealth or `optkit doctor`."
            )
        self._is_stuck = True

    def _text(self, event: SpikeEvent) -> str:
        usual = self._detector.usual
        found = f"step {event.step}: loss {event.loss:.3g}, gradient norm {event.norm:.3g}"
        if usual is not None:
            found += f", where {usual[0]:.3g} and {usual[1]:.3g} are usual"
        several = "the losses stay too high"
        again = f"back to the state before step {event.back_to}"
        does = {
            "skip": "the batch is dropped",
            "shrink": "the gradient is scaled to the usual norm",
            "accept": f"{several}, and there is no state to return to: this is the new level",
            "rollback": f"{several}: {again}, and to the rate in {self.rewarm} steps",
            "stop": f"{several} after {self.max_rollbacks} rollbacks: {again}, and the run stops; lower the learning "
            "rate, or look at the data",
        }
        return f"{found}: {does[event.action]}."

    def _release(self) -> None:
        """`events` can be read after the fit."""
        self._buffers, self._rates = None, LoweredRates()
