# SPDX-License-Identifier: Apache-2.0
"""L1 and L2 regularization of the weights as part of the update, with exact zeros."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_optkit._checks import check_bools, check_in
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.refusals import refuse_twice
from lightning_optkit.callbacks.seams.run import Run, has_lazy_parameters
from lightning_optkit.callbacks.seams.steps import (
    StepListener,
    StepWatch,
    refuse_folded_average,
    was_updated,
    watch_steps,
)
from lightning_optkit.regularization.soft_threshold import soft_threshold_
from lightning_optkit.regularization.sparsity import sparsity
from lightning_optkit.regularization.weights_of import weights_of
from lightning_optkit.step import OnePassOptimizer
from lightning_optkit.step.shards import reshard

__all__ = ["ElasticNet"]


class ElasticNet(FitCallback):
    r"""Shrinks the weights in every optimizer step: by a factor (L2) and by a constant (L1), which gives exact zeros.

    .. math:: w \leftarrow S_{\eta \lambda_1}\big((1 - \eta \lambda_2)\, w - u\big), \quad
        S_\theta(v) = \operatorname{sign}(v) \max(|v| - \theta, 0)

    with the optimizer's update :math:`u` and learning rate :math:`\eta`. In a one-pass optimizer (of this package, or
    with `Fuse`) both are part of the step, as its group entries `l1` and, with decoupled decay, `weight_decay`;
    `HyperparameterSchedule` can then schedule them. For any other optimizer, and for a group of which only some
    parameters are regularized, they are applied in a separate pass. `explain()` shows which.

    A resumed run uses the strengths given here. Sparsity is logged at the end of each epoch if there is a logger:
    `sparsity` overall, and `sparsity/<parameter>`.

    Args:
        l1: Lambda 1, in [0, inf).
        l2: Lambda 2, in [0, inf); decoupled decay, as in AdamW.
        exclude_bias_and_norm: Skip biases, gains and normalization layers (`weights_of`).
        verbose: Print when training starts where it is applied.

    Raises:
        ValueError: if a strength is out of range or both are 0; when the fit starts, if the optimizer has `l1` or
            (with `l2`) `weight_decay` already, or averages the weights in a step that this cannot be part of.

    Source: Zou & Hastie 2005; Parikh & Boyd 2014, Section 6.5.2; Loshchilov & Hutter 2019 for the decoupled decay.

    Example:
        >>> trainer = pl.Trainer(callbacks=[ElasticNet(l1=1e-4)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self, l1: float = 0.0, l2: float = 0.0, exclude_bias_and_norm: bool = True, verbose: bool = True
    ) -> None:
        self.l1, self.l2 = (
            check_in(type(self).__name__, "l1", l1, "[0, inf)"),
            check_in(type(self).__name__, "l2", l2, "[0, inf)"),
        )
        if l1 == l2 == 0:
            raise ValueError(f"{type(self).__name__}(l1=0.0, l2=0.0): one of them must be greater than 0.")
        check_bools(type(self).__name__, exclude_bias_and_norm=exclude_bias_and_norm, verbose=verbose)
        self.exclude_bias_and_norm, self._verbose = exclude_bias_and_norm, verbose
        self._weights: dict[str, Tensor] = {}  # including frozen ones
        self._taken: dict[Optimizer, list[tuple[int, int]]] = {}  # per group: weights, and number of all parameters
        # Groups by index, since loading a checkpoint creates new ones.
        self._folded: dict[tuple[Optimizer, int, str], tuple[float, Any]] = {}  # per entry: our value, and the user's
        self._own: dict[str, list[tuple[Optimizer, int]]] = {"l1": [], "l2": []}
        self._watches: dict[str, StepWatch] = {}
        self._module: pl.LightningModule | None = None
        self._waits_for_shapes = False
        self._plan: list[str] = []

    def sparsity(self) -> dict[str, float]:
        """Fraction of exact zeros in every regularized parameter of the last fit."""
        return sparsity({name: weight for name, weight in self._weights.items() if weight.requires_grad})

    def explain(self) -> str:
        """Per group: what is part of the step, and what is applied in a separate pass."""
        return "\n".join(self._plan)

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_twice(self, trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._module, self._plan = pl_module, []
        self._weights = self._weights_now()
        if not (self._weights or has_lazy_parameters(pl_module)):
            raise ValueError(f"{type(self).__name__}(exclude_bias_and_norm=True): the module has no other parameters.")
        self._at_end(self._put_back)
        self._waits_for_shapes = has_lazy_parameters(pl_module)
        if self._waits_for_shapes:
            self._listen("shapes", StepListener(type(self).__name__, before=self._take_again))
        self._listen("groups", StepListener(type(self).__name__, joins=self._take))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for (optimizer, index, entry), (ours, _) in self._folded.items():
            optimizer.param_groups[index][entry] = ours  # a checkpoint may have restored another value
        for optimizer, _ in self._own["l1"]:
            refuse_folded_average(type(self).__name__, optimizer, "split the groups by ParameterGroups")
        if self._verbose:
            rank_zero_info(self.explain())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for place, optimizer in enumerate(Run(trainer).optimizers):
            self._take(optimizer, place)  # for groups added since

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shares = self.sparsity() if trainer.loggers else {}
        total = sum(self._weights[name].numel() for name in shares)
        if total:  # 0 where all of them are frozen now
            pl_module.log(
                "sparsity", sum(share * self._weights[name].numel() for name, share in shares.items()) / total
            )
            pl_module.log_dict({f"sparsity/{name}": share for name, share in shares.items()})

    # --- implementation ---

    def _weights_now(self) -> dict[str, Tensor]:
        assert self._module is not None
        reshard(self._module)  # else a validation has left other parameters than those of the optimizers
        return weights_of(self._module, frozen=True) if self.exclude_bias_and_norm else _all_of(self._module)

    def _take(self, optimizer: Optimizer, place: int) -> None:
        """Takes over groups that are new or have changed since."""
        taken, groups = self._taken.setdefault(optimizer, []), optimizer.param_groups
        if [len(group["params"]) for group in groups] == [total for _, total in taken]:
            return
        self._weights = self._weights_now()
        weights = set(self._weights.values())
        for index, group in enumerate(groups):
            now = sum(param in weights for param in group["params"]), len(group["params"])
            if index < len(taken) and taken[index] != now:
                self._give_back(optimizer, index)
            if index >= len(taken) or taken[index] != now:
                taken[index : index + 1] = [now]
                if now[0]:
                    self._place(optimizer, index, group, *now)
        if self._own["l2"]:
            self._listen("l2", StepListener(type(self).__name__, before=self._decay))
        if self._own["l1"]:
            self._listen("l1", StepListener(type(self).__name__, after=self._threshold))

    def _take_again(self, optimizer: Optimizer, place: int) -> None:
        """After the first forward pass the shapes of lazy layers are known."""
        assert self._module is not None
        if self._waits_for_shapes and not has_lazy_parameters(self._module):
            self._waits_for_shapes = False
            self._taken[optimizer] = [(-1, -1)] * len(self._taken[optimizer])
            self._take(optimizer, place)

    def _listen(self, what: str, listener: StepListener) -> None:
        assert self._module is not None
        if what not in self._watches:
            self._watches[what] = watch_steps(self._module.trainer, listener)

    def _place(self, optimizer: Optimizer, index: int, group: dict[str, Any], num: int, total: int) -> None:
        self._check(optimizer, index, group)
        where = []
        for name, entry, can_fold in (
            ("l1", "l1", isinstance(optimizer, OnePassOptimizer)),
            ("l2", "weight_decay", bool(group.get("decoupled_weight_decay")) and not group.get("decouple_lr")),
        ):
            strength = getattr(self, name)
            if strength and num == total and can_fold:
                self._folded[optimizer, index, entry] = strength, group[entry]
                group[entry] = strength
                where.append(f"{name} {strength:g} in the step")
            elif strength:
                self._own[name].append((optimizer, index))
                where.append(f"{name} {strength:g} in its own pass")
        which = f"{num} of {total} parameters"
        self._plan.append(f"ElasticNet: {type(optimizer).__name__}, group {index}, {which}: {', '.join(where)}")

    def _give_back(self, optimizer: Optimizer, index: int) -> None:
        """Restores one group."""
        for key in [key for key in self._folded if key[:2] == (optimizer, index)]:
            optimizer.param_groups[index][key[2]] = self._folded.pop(key)[1]
        self._own = {name: [each for each in own if each != (optimizer, index)] for name, own in self._own.items()}

    def _check(self, optimizer: Optimizer, index: int, group: dict[str, Any]) -> None:
        for name, entry in (("l1", "l1"), ("l2", "weight_decay")):
            there = float(group.get(entry, 0.0))
            if getattr(self, name) and there:
                raise ValueError(
                    f"{type(self).__name__}({name}={getattr(self, name):g}): group {index} of "
                    f"{type(optimizer).__name__} has {entry}={there:g} already; use one of the two."
                )
        if "lr" not in group:
            raise ValueError(
                f"{type(self).__name__}(...): group {index} of {type(optimizer).__name__} has no learning rate."
            )

    @torch.no_grad()
    def _decay(self, optimizer: Optimizer, place: int) -> None:
        for lr, params in self._of(optimizer, "l2"):
            for param in params:
                param.mul_(1.0 - lr * self.l2)

    def _threshold(self, optimizer: Optimizer, place: int) -> None:
        for lr, params in self._of(optimizer, "l1"):
            soft_threshold_(params, lr * self.l1)

    def _of(self, optimizer: Optimizer, name: str) -> Iterator[tuple[float, list[Tensor]]]:
        """The separate pass for `optimizer`: learning rate, and the parameters to update."""
        weights = set(self._weights.values())
        for owner, index in self._own[name]:
            if owner is optimizer:
                group = optimizer.param_groups[index]
                yield float(group["lr"]), [p for p in group["params"] if p in weights and was_updated(optimizer, p)]

    def _put_back(self) -> None:
        for watch in self._watches.values():
            watch.remove()
        for (optimizer, index, entry), (_, users) in self._folded.items():
            if entry in optimizer.param_groups[index]:  # Fuse may have removed its entries already
                optimizer.param_groups[index][entry] = users

    def _release(self) -> None:  # the weights are kept for `sparsity`
        self._watches, self._folded, self._own, self._taken = {}, {}, {"l1": [], "l2": []}, {}
        self._module = None

    def _forget(self) -> None:
        self._release()
        self._weights = {}


def _all_of(module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: param for name, param in module.named_parameters() if not is_lazy(param)}
