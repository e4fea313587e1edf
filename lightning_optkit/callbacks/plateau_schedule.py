# SPDX-License-Identifier: Apache-2.0
"""Lowers the learning rate of an unchanged LightningModule when a metric stops improving.

The decision is that of `torch.optim.lr_scheduler.ReduceLROnPlateau`. Lightning steps it once per epoch, even without a
validation (a stale value then counts as one more bad epoch), and after the checkpoint of that epoch is written; this
callback steps it once per measurement, and before the checkpoint.
"""

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_optkit._checks import check_bools, check_in, check_int, check_one_of, check_state, check_text
from lightning_optkit.callbacks.scheduling.existing_schedulers import refuse_other_schedules, take_over_schedulers
from lightning_optkit.callbacks.seams.fit_callback import FitCallback

__all__ = ["PlateauSchedule"]

_STATE = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


class PlateauSchedule(FitCallback):
    """Multiplies the learning rate by `factor` after more than `patience` measurements without improvement.

    With `LRSchedule` it lowers the base value that the schedule multiplies: for a warmup followed by a plateau rule,
    add `LRSchedule(warmup(constant(), 500))`. Under DDP the ranks use the mean of their metrics, so that all make the
    same decision. When resuming from a checkpoint of the batch end right before a validation (`every_n_train_steps`),
    Lightning skips that validation, and a measurement is missed; a checkpoint written at or after the validation is
    correct.

    Args:
        monitor: Name of a logged metric.
        mode: "min" if smaller is better, "max" if larger is.
        factor: Factor of the learning rate, in (0, 1).
        patience: Measurements without improvement to tolerate, at least 0.
        threshold: Smallest change that counts as an improvement, in [0, inf).
        threshold_mode: "rel": relative to the best value; "abs": absolute.
        cooldown: Measurements to ignore after a reduction, at least 0.
        min_lr: Lower bound of the learning rate, in [0, inf).
        eps: Smallest reduction to apply, in [0, inf).
        check_on_train_epoch_end: Measure at the end of each training epoch (for training metrics) instead of after each
            validation. Default: only in a run without validation.
        replace_schedulers: Take the place of schedulers of `configure_optimizers` until the fit ends, as `LRSchedule`
            does. False: raise if there are any.
        verbose: Print each reduction.

    Raises:
        ValueError: for an argument out of range; in the fit, with another schedule that cannot be replaced, and if the
            metric does not exist when it is needed.

    Example:
        >>> trainer = pl.Trainer(callbacks=[PlateauSchedule("val_loss", patience=3)], logger=False)
    """

    def __init__(
        self,
        monitor: str,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_lr: float = 0.0,
        eps: float = 1e-8,
        *,
        check_on_train_epoch_end: bool | None = None,
        replace_schedulers: bool = True,
        verbose: bool = True,
    ) -> None:
        check_text(type(self).__name__, "monitor", monitor, 'a metric, such as "val_loss"')
        check_bools(type(self).__name__, replace_schedulers=replace_schedulers, verbose=verbose)
        check_one_of(type(self).__name__, "check_on_train_epoch_end", check_on_train_epoch_end, (None, False, True))
        check_one_of(type(self).__name__, "mode", mode, ("min", "max"))
        check_in(type(self).__name__, "factor", factor, "(0, 1)")
        check_int(type(self).__name__, "patience", patience, minimum=0)
        check_in(type(self).__name__, "threshold", threshold, "[0, inf)")
        check_one_of(type(self).__name__, "threshold_mode", threshold_mode, ("rel", "abs"))
        check_int(type(self).__name__, "cooldown", cooldown, minimum=0)
        check_in(type(self).__name__, "min_lr", min_lr, "[0, inf)")
        check_in(type(self).__name__, "eps", eps, "[0, inf)")
        self.monitor = monitor
        self._arguments: dict[str, Any] = {
            "mode": mode,
            "factor": factor,
            "patience": patience,
            "threshold": threshold,
            "threshold_mode": threshold_mode,
            "cooldown": cooldown,
            "min_lr": min_lr,
            "eps": eps,
        }
        self._at_epoch_end, self._at_epoch_end_now = check_on_train_epoch_end, False
        self._replace_schedulers, self._verbose = replace_schedulers, verbose
        self._judges: list[ReduceLROnPlateau] = []
        self._restored: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """The state of the plateau rule, for each optimizer."""
        if not self._judges:
            return {"judges": self._restored}
        return {"judges": [{name: getattr(judge, name) for name in _STATE} for judge in self._judges]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state."""
        judges = check_state(type(self).__name__, state_dict, judges=list)["judges"]
        number = (int, float)
        for judge in judges:
            check_state(
                f"{type(self).__name__}.load_state_dict(state_dict['judges']", judge, **dict.fromkeys(_STATE, number)
            )
        self._restored = judges

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._judges, self._restored = [], []
        refuse_other_schedules(type(self).__name__, trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        owner, replaces = type(self).__name__, self._replace_schedulers
        self._at_end(take_over_schedulers(owner, trainer, pl_module, replaces, self._verbose))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._at_epoch_end_now = not trainer.enable_validation if self._at_epoch_end is None else self._at_epoch_end
        if not self._at_epoch_end_now and not trainer.enable_validation:
            raise ValueError(
                f"{type(self).__name__}(check_on_train_epoch_end=False): this run validates nothing; give it "
                "validation data and a validation_step, or monitor a metric of the training with "
                "check_on_train_epoch_end=True."
            )
        self._judges = [ReduceLROnPlateau(optimizer, **self._arguments) for optimizer in trainer.optimizers]
        for judge, restored in zip(self._judges, self._restored, strict=False):
            vars(judge).update(restored)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._judges and not self._at_epoch_end_now:  # no state yet in the sanity check
            self._judge(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._at_epoch_end_now:
            self._judge(trainer)

    # --- implementation ---

    def _forget(self) -> None:
        self._restored = self.state_dict()["judges"]
        self._judges = []

    def _judge(self, trainer: pl.Trainer) -> None:
        value = self._measured(trainer)
        for judge, optimizer in zip(self._judges, trainer.optimizers, strict=True):
            groups = optimizer.param_groups
            # The state is kept when optimizers or groups change.
            judge.optimizer, judge.min_lrs = optimizer, [self._arguments["min_lr"]] * len(groups)
            before = [float(group["lr"]) for group in groups]
            judge.step(value)
            for group, old in zip(groups, before, strict=True):
                new = float(group["lr"])
                if new == old:
                    continue
                if "initial_lr" in group:  # the value that LRSchedule multiplies
                    group["initial_lr"] = float(group["initial_lr"]) * new / old
                if self._verbose:
                    name = group.get("name", type(judge.optimizer).__name__)
                    rank_zero_info(
                        f"PlateauSchedule: {self.monitor} is {value:g}; lr of {name} from {old:g} to {new:g}"
                    )

    def _measured(self, trainer: pl.Trainer) -> float:
        metric = trainer.callback_metrics.get(self.monitor)
        if metric is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            novalidation = "" if trainer.enable_validation else " this run validates nothing;"
            raise ValueError(
                f"{type(self).__name__}(monitor={self.monitor!r}): no metric of this name was logged;{novalidation} "
                f"the metrics are: {known}."
            )
        if trainer.world_size == 1:
            return float(metric)
        here = torch.as_tensor(metric, device=trainer.strategy.root_device, dtype=torch.float32)
        return float(trainer.strategy.reduce(here, reduce_op="mean"))
