# SPDX-License-Identifier: Apache-2.0
"""Schedule-Free around any optimizer of a run."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit._checks import check_in, check_instance, check_int, check_state, check_tensor
from lightning_optkit.averaging._schedule_free_points import GroupWeights, average_at, begin_step_, end_step_
from lightning_optkit.callbacks.elastic_net import ElasticNet
from lightning_optkit.callbacks.lookahead import Lookahead
from lightning_optkit.callbacks.max_norm import MaxNorm
from lightning_optkit.callbacks.qk_clip import QKClip
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.refusals import refuse_split_parameters, refuse_twice
from lightning_optkit.callbacks.seams.steps import StepListener, refuse_folded_average, watch_steps
from lightning_optkit.callbacks.weight_averaging import WeightAveraging

__all__ = ["ScheduleFreeWrapper"]

_AVERAGES = (WeightAveraging, StochasticWeightAveraging, getattr(lightnings, "WeightAveraging", WeightAveraging))
_CHANGES_WEIGHTS = (Lookahead, MaxNorm, QKClip, ElasticNet)


class ScheduleFreeWrapper(FitCallback):
    """Schedule-Free around any optimizer, also with `Fuse`: its steps move z, whose average x is the model.

    Gradients are taken at y, a mean of x and z, so the weights of the model are y during training. Validation uses x,
    the `state_dict` of every checkpoint contains it (with y and z in the state of this callback, for resuming), and the
    module has it when `fit` returns. The momentum of the optimizer itself can be turned off. Use a constant rate, or a
    warm-up alone. `ScheduleFreeSGD` and `ScheduleFreeAdamW` do the same in one pass. BatchNorm's running statistics are
    those of y.

    Args:
        momentum: Weight of x in y, in (0, 1).
        weight_decay_at_y: Decay computed from y, times the rate of the group; in [0, inf). The decay of the optimizer
            is computed from z.
        weight_lr_power: A step weighs the largest rate of its group so far to this power, in [0, inf). 0: all alike.
        r: Power of the step's number in its weight, in [0, inf).

    Raises:
        ValueError: for an argument out of range; when the fit starts, for an optimizer that is schedule-free itself,
            LBFGS, 16-bit parameters, another average, a callback that changes the weights after the step, or a strategy
            that splits parameters over processes.

    Cost: 4 bytes per parameter, 8 while the module holds x; a pass over the weights before and after every step.

    Source: Defazio et al. 2024, arXiv:2405.15682, Equations 2-4; the authors' package has it under this name.

    Example:
        >>> trainer = pl.Trainer(callbacks=[ScheduleFreeWrapper()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self, momentum: float = 0.9, weight_decay_at_y: float = 0.0, weight_lr_power: float = 2.0, r: float = 0.0
    ) -> None:
        owner = type(self).__name__
        self.momentum = check_in(owner, "momentum", momentum, "(0, 1)")
        self.weight_decay_at_y = check_in(owner, "weight_decay_at_y", weight_decay_at_y, "[0, inf)")
        self.weight_lr_power = check_in(owner, "weight_lr_power", weight_lr_power, "[0, inf)")
        self.r = check_in(owner, "r", r, "[0, inf)")
        self._z: dict[str, Tensor] = {}  # by the name of the parameter; x during a step
        self._y: dict[str, Tensor] = {}  # of every parameter that holds x
        self._weights: list[list[GroupWeights]] = []  # by optimizer and group
        self._params: dict[str, Tensor] = {}  # those that have a z
        self._stepping: dict[Tensor, str] = {}  # those that hold z, during a step

    def state_dict(self) -> dict[str, Any]:
        """The points y and z of every parameter that was updated, and the weights of each group."""
        self._end_unfinished_step()
        weights = [[[w.steps, w.weight_sum, w.lr_max] for w in groups] for groups in self._weights]
        return {"y": self._points(), "z": dict(self._z), "weights": weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state."""
        owner = f"{type(self).__name__}.load_state_dict"
        checked = check_state(type(self).__name__, state_dict, y=dict, z=dict, weights=list)
        for groups in checked["weights"]:
            check_instance(owner, "state_dict['weights']", groups, list, "a list of groups of each optimizer")
        for point in ("y", "z"):
            for name, kept in checked[point].items():
                check_tensor(owner, f"state_dict[{point!r}][{name!r}]", kept, "inexact")
        self._weights = [[_loaded(owner, saved) for saved in groups] for groups in checked["weights"]]
        self._y, self._z = dict(checked["y"]), {name: z.clone() for name, z in checked["z"].items()}
        # Loaded within a run, as after the test of LRFinder, what was stepped since is forgotten.
        self._params, self._stepping = {name: p for name, p in self._params.items() if name in self._z}, {}

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_twice(self, trainer)
        refuse_split_parameters(self, trainer)
        self._refuse_others(trainer)
        self._z, self._y, self._weights, self._params, self._stepping = {}, {}, [], {}, {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def begin(optimizer: Optimizer, place: int) -> None:
            self._begin_step(pl_module, optimizer)

        self._override(pl_module, "on_save_checkpoint", self._wrap_on_save_checkpoint(pl_module))
        self._at_end(self._show_average)
        listener = StepListener(type(self).__name__, joins=self._check, before=begin, after=self._end_step)
        self._at_end(watch_steps(trainer, listener).remove)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            refuse_folded_average(type(self).__name__, optimizer, "leave out the average")
        named = dict(pl_module.named_parameters())
        self._params = {name: p for name, p in named.items() if name in self._z and p.shape == self._z[name].shape}
        self._show_trained()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show_average()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._show_trained()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show_average()

    # --- what it cannot be combined with ---

    def _refuse_others(self, trainer: pl.Trainer) -> None:
        owner = f"{type(self).__name__}(...)"
        for kind in _AVERAGES:
            for other in callbacks_of(trainer, kind):
                raise ValueError(f"{owner}: {type(other).__name__} averages the weights too; use one of the two.")
        for changing in _CHANGES_WEIGHTS:
            for each in callbacks_of(trainer, changing):
                if not isinstance(each, ElasticNet) or each.l1:
                    raise ValueError(
                        f"{owner}: {type(each).__name__} changes the weights after the step, and the average would not "
                        "follow; use one of the two."
                    )

    def _check(self, optimizer: Optimizer, place: int) -> None:
        owner, name = f"{type(self).__name__}(...)", type(optimizer).__name__
        if any("train_mode" in group for group in optimizer.param_groups):
            raise ValueError(f"{owner}: {name} is schedule-free itself; use the ScheduleFree callback for it.")
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.dtype.itemsize < 4:
                    raise ValueError(
                        f"{owner}: a parameter is {param.dtype}; x, y and z must be fp32 or wider, as with "
                        'precision="bf16-mixed".'
                    )

    # --- steps ---

    def _begin_step(self, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        self._end_unfinished_step()
        names = {param: name for name, param in pl_module.named_parameters()}
        for group in optimizer.param_groups:
            decay = float(group["lr"]) * self.weight_decay_at_y
            for param in group["params"]:
                if param.grad is None or param not in names:
                    continue
                name = names[param]
                z = self._z.get(name)
                if z is None or z.shape != param.shape:
                    z = param.detach().clone()
                self._z[name] = z = z.to(param.device, param.dtype)  # a checkpoint is loaded on the CPU
                self._params[name], self._stepping[param] = param, name
                begin_step_(param, z, self.momentum, decay)

    def _end_step(self, optimizer: Optimizer, place: int) -> None:
        self._weights += [[] for _ in range(place + 1 - len(self._weights))]
        weights = self._weights[place]
        weights += [GroupWeights() for _ in range(len(optimizer.param_groups) - len(weights))]
        for group, counted in zip(optimizer.param_groups, weights, strict=False):
            lr = float(group["lr"]) * float(group.get("d", 1.0))  # an estimated rate
            share = counted.next_share(lr, self.r, self.weight_lr_power)
            for param in group["params"]:
                if param in self._stepping:
                    end_step_(param, self._z[self._stepping.pop(param)], self.momentum, share)

    def _end_unfinished_step(self) -> None:
        """Puts y into parameters whose step failed."""
        stepping, self._stepping = self._stepping, {}
        for param, name in stepping.items():
            end_step_(param, self._z[name], self.momentum, 0.0)

    # --- the point that the module holds ---

    def _points(self) -> dict[str, Tensor]:
        """The y of every parameter that has one."""
        return {name: param.detach() for name, param in self._params.items()} | self._y

    @torch.no_grad()
    def _show_average(self) -> None:
        self._end_unfinished_step()
        for name, param in self._params.items():
            if name not in self._y:
                self._y[name] = param.detach().clone()
                param.copy_(average_at(param, self._z[name].to(param.device, param.dtype), self.momentum))

    @torch.no_grad()
    def _show_trained(self) -> None:
        for name, param in self._params.items():
            if name in self._y:
                param.copy_(self._y[name])
        self._y = {}

    def _averages(self) -> Mapping[Tensor, Tensor]:
        """The x of every parameter that holds y."""
        self._end_unfinished_step()
        held = {name: param for name, param in self._params.items() if name not in self._y}
        return {
            param: average_at(param.detach(), self._z[name].to(param.device, param.dtype), self.momentum)
            for name, param in held.items()
        }

    def _wrap_on_save_checkpoint(self, pl_module: pl.LightningModule) -> Callable[[dict[str, Any]], None]:
        # Not the callback's own hook, which Lightning skips if only weights are saved.
        original = pl_module.on_save_checkpoint

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            averages = self._averages()
            for name, param in pl_module.named_parameters(remove_duplicate=False):
                if param in averages and name in checkpoint["state_dict"]:
                    checkpoint["state_dict"][name] = averages[param]
            original(checkpoint)

        return on_save_checkpoint

    def _forget(self) -> None:
        self._y, self._params, self._stepping = self._points(), {}, {}


def _loaded(owner: str, saved: Any) -> GroupWeights:
    name = "state_dict['weights']"
    if not isinstance(saved, list) or len(saved) != 3:
        raise ValueError(f"{owner}({name}=...): must hold the step count, the sum and the largest rate of each group.")
    steps = check_int(owner, name, saved[0], minimum=0)
    weight_sum, lr_max = (check_in(owner, name, number, "[0, inf)") for number in saved[1:])
    return GroupWeights(steps, weight_sum, lr_max)
