# SPDX-License-Identifier: Apache-2.0
"""Early stopping by the classical criteria, with the best weights restored."""

import math
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_optkit._checks import (
    check_bools,
    check_in,
    check_instance,
    check_int,
    check_one_of,
    check_state,
    check_text,
)
from lightning_optkit.callbacks.seams.checkpointed_weights import copy_weights, load_weights
from lightning_optkit.callbacks.seams.lightning_packages import is_a
from lightning_optkit.callbacks.seams.lightning_private import key_of_state
from lightning_optkit.callbacks.seams.refusals import refuse_listed_twice
from lightning_optkit.callbacks.seams.run_free import RunFree
from lightning_optkit.regularization.early_stopping import (
    generalization_loss,
    progress_quotient,
    successive_increases,
)

__all__ = ["EarlyStoppingCriterion"]


class EarlyStoppingCriterion(RunFree, Callback):
    """Stops by Prechelt's criteria, which use the shape of the curves; Lightning's EarlyStopping counts patience.

    - "GL": the validation error is more than `alpha` percent above its minimum.
    - "PQ": at the end of a strip, that loss divided by the progress of the training error exceeds `alpha`. It waits
      while training still progresses fast.
    - "UP": the validation error rose in `successive` consecutive strips, by any amount.

    Time is measured in validations, one per epoch by default; a strip is `strip` of them. The training error is the
    mean of the values returned by `training_step` since the last validation. Under DDP both are averaged over the
    processes, so that all make the same decision. A non-finite error stops immediately.

    When `fit` returns, the module has the weights of the lowest validation error, exactly as validated (including an
    average shown by `WeightAveraging`), unless `restore_best=False`. Histories and best weights are saved in the
    checkpoint, so a resumed run makes the same decisions as an uninterrupted one. Every process keeps the best weights
    on the CPU, unsharded even with FSDP2 (`ModelParallelStrategy`).

    Args:
        criterion: "GL", "PQ" or "UP".
        alpha: Threshold of GL (percent; 1 to 5 are common) and PQ (0.5 to 3), in (0, inf).
        successive: For UP: number of consecutive strips, in [1, inf); 2 to 8 in the paper.
        strip: Validations per strip, in [1, inf).
        monitor: Name of the logged validation error, which must be positive; lower is better.
        restore_best: Restore the best weights at the end.
        verbose: Print when it stopped and what is restored.

    Raises:
        ValueError: for an argument out of range; when the fit starts, with `restore_best` for a strategy without access
            to the parameters; in training, for an error that is not positive.
        RuntimeError: if the module does not log `monitor`.

    Source: Prechelt 1998, "Early Stopping - But When?", Section 2.

    Example:
        >>> stopping = EarlyStoppingCriterion("PQ", alpha=1.0)
        >>> trainer = pl.Trainer(callbacks=[stopping], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        criterion: Literal["GL", "PQ", "UP"] = "PQ",
        alpha: float = 1.0,
        successive: int = 3,
        strip: int = 5,
        monitor: str = "val_loss",
        restore_best: bool = True,
        verbose: bool = True,
    ) -> None:
        check_one_of(type(self).__name__, "criterion", criterion, ("GL", "PQ", "UP"))
        self.criterion = criterion
        self.alpha = check_in(type(self).__name__, "alpha", alpha, "(0, inf)")
        self.successive = check_int(type(self).__name__, "successive", successive, minimum=1)
        self.strip = check_int(type(self).__name__, "strip", strip, minimum=1)
        check_text(type(self).__name__, "monitor", monitor, 'a metric, such as "val_loss"')
        check_bools(type(self).__name__, restore_best=restore_best, verbose=verbose)
        self.monitor, self.restore_best, self._verbose = monitor, restore_best, verbose
        self._reset()

    def _reset(self) -> None:
        self.errors: list[float] = []
        self.training_errors: list[float] = []
        self.stopped_at: int | None = None
        self._best: dict[str, Tensor] | None = None
        self._validated: dict[str, Tensor] = {}
        self._losses: list[Tensor] = []
        self._restored = False  # the module has other weights than those of the last step

    @property
    def state_key(self) -> str:
        """Separate states, since several criteria may be used together."""
        return key_of_state(self, 
            criterion=self.criterion, alpha=self.alpha, successive=self.successive, strip=self.strip,
            monitor=self.monitor,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Both histories, the training losses since the last validation, and the best weights."""
        return dict(
            errors=list(self.errors),
            training_errors=list(self.training_errors),
            losses=[float(loss) for loss in self._losses],
            stopped_at=self.stopped_at,
            best=self._best,
            restored=self._restored,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state."""
        nothing = type(None)
        state = check_state(
            type(self).__name__,
            state_dict,
            errors=list,
            training_errors=list,
            losses=list,
            stopped_at=(int, nothing),
            best=(dict, nothing),
        )
        for name in ("errors", "training_errors", "losses"):
            for value in state[name]:
                check_instance(
                    f"{type(self).__name__}.load_state_dict", f"state_dict[{name!r}]", value, float, "numbers"
                )
        self.errors, self.training_errors = list(state["errors"]), list(state["training_errors"])
        self._losses = [torch.tensor(loss, dtype=torch.float64) for loss in state["losses"]]
        self.stopped_at, self._best = state["stopped_at"], state["best"]
        self._restored = bool(state.get("restored", False))  # of older versions no checkpoint has it

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_listed_twice(self, trainer)
        self._reset()
        if self.restore_best and is_a(trainer.strategy, FSDPStrategy, DeepSpeedStrategy):
            raise ValueError(
                f"{type(self).__name__}(restore_best=True): {type(trainer.strategy).__name__} hides the parameters; "
                "use ModelParallelStrategy (FSDP2) or DDPStrategy, or restore_best=False."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.enable_validation:
            rank_zero_warn(
                f"{type(self).__name__}(monitor={self.monitor!r}): this run validates nothing, so that it is never "
                "stopped; give it validation data, and the module a validation_step."
            )
        if self._restored:
            self._restored = False
            rank_zero_warn(
                f"{type(self).__name__}(restore_best=True): the checkpoint was saved after the fit, with the best "
                "weights and the optimizer's state of the last step; to go on from the last weights, resume from one "
                "that was saved during the fit."
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) and "loss" in outputs else outputs
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach().double())

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # At this point callbacks that swap the weights for validation have done so, and have not restored them yet.
        is_counted = trainer.state.fn == "fit" and not trainer.sanity_checking
        if self.restore_best and is_counted and batch_idx == dataloader_idx == 0:
            self._validated = copy_weights(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not at the end of the training epoch: a checkpoint of this validation must contain its error.
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._record(trainer)
        if self.restore_best and self.errors[-1] == min(self.errors):
            self._best = self._validated
        self._validated = {}
        reason = self.why_stop()
        if reason is not None and not trainer.should_stop:
            trainer.should_stop = True
            self.stopped_at = len(self.errors)
            if self._verbose:
                rank_zero_info(f"EarlyStoppingCriterion: stops after validation {self.stopped_at}: {reason}.")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # After on_fit_end, where an average would overwrite them; not called after an exception.
        if stage == "fit" and self._best is not None:
            load_weights(f"{type(self).__name__}(restore_best=True)", pl_module, self._best)
            best = min(range(len(self.errors)), key=self.errors.__getitem__)
            self._restored = bool(self._losses) or best < len(self.errors) - 1
            if self._verbose:
                rank_zero_info(
                    f"EarlyStoppingCriterion: weights of validation {best + 1} of {len(self.errors)} restored, "
                    f"{self.monitor} {self.errors[best]:.4g}."
                )

    # --- implementation ---

    def _forget(self) -> None:
        self._validated = {}

    def _record(self, trainer: pl.Trainer) -> None:
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise RuntimeError(
                f"{type(self).__name__}(monitor={self.monitor!r}): the module does not log it; it logs {logged}."
            )
        error = trainer.callback_metrics[self.monitor].detach().double()
        training_error = torch.stack(self._losses).mean() if self._losses else error.new_tensor(math.nan)
        self._losses = []
        both = trainer.strategy.reduce(torch.stack([error, training_error.to(error.device)]), reduce_op="mean")
        self.errors.append(float(both[0]))
        self.training_errors.append(float(both[1]))

    def why_stop(self) -> str | None:
        """Why it would stop, given the current `errors` and `training_errors`; None if it would not."""
        last = self.errors[-1]
        if not math.isfinite(last):
            return f"{self.monitor} is {last}"
        is_end_of_strip = len(self.errors) % self.strip == 0
        if self.criterion == "GL":
            lost = generalization_loss(self.errors)
            return f"{lost:.3g} % above the minimum" if lost > self.alpha else None
        if self.criterion == "PQ" and is_end_of_strip:
            quotient = progress_quotient(self.errors, self.training_errors, self.strip)
            return f"the progress quotient is {quotient:.3g}" if quotient > self.alpha else None
        if self.criterion == "UP" and is_end_of_strip:
            count = successive_increases(self.errors, self.strip)
            return f"{self.monitor} rose in {count} strips in a row" if count >= self.successive else None
        return None
