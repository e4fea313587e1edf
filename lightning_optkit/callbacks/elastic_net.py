# SPDX-License-Identifier: Apache-2.0
"""L1 and L2 regularization of the weights, as part of the update: zeros are exact."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit._checks import check_bools, check_in
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.refusals import refuse_twice
from lightning_optkit.callbacks.seams.update_hooks import after_update, before_update, refuse_folded_average
from lightning_optkit.regularization.soft_threshold import soft_threshold_
from lightning_optkit.regularization.sparsity import sparsity
from lightning_optkit.regularization.weights_of import weights_of
from lightning_optkit.step import OnePassOptimizer

__all__ = ["ElasticNet"]


class ElasticNet(FitCallback):
    r"""Shrinks the weights with every optimizer step: by a share (L2) and by a constant (L1), which leaves exact zeros.

    .. math:: w \leftarrow S_{\eta \lambda_1}\big((1 - \eta \lambda_2)\, w - u\big), \quad
        S_\theta(v) = \operatorname{sign}(v) \max(|v| - \theta, 0)

    with the optimizer's update :math:`u` and learning rate :math:`\eta`. In a one-pass optimizer (of this package, or
    by `Fuse`) both are folded into the step, as its group entries `l1` and, where decay is decoupled, `weight_decay`;
    `HyperparameterSchedule` can then schedule them. With any other optimizer, and for a group of which only some
    parameters are regularized, the same is done in a pass of its own. `explain()` says which.

    A resumed run uses the strengths given here. Sparsity is logged at the end of each epoch if there is a logger:
    `sparsity` over all, and `sparsity/<parameter>`.

    Args:
        l1: Lambda 1, in [0, inf).
        l2: Lambda 2, in [0, inf); decoupled decay, as in AdamW.
        exclude_bias_and_norm: Leave biases, gains and normalization layers alone (`weights_of`).
        verbose: Say when training starts where it is done.

    Raises:
        ValueError: if a strength is out of range or both are 0; when the fit starts, if the optimizer has `l1` or
            (with `l2`) `weight_decay` already, or averages the weights in a step that this cannot be folded into.

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
        self._weights: dict[str, Tensor] = {}
        # Groups by index: loading a checkpoint makes new ones.
        self._folded: list[tuple[Optimizer, int, str, float, Any]] = []  # ..., entry, our value, the user's
        self._own: dict[str, list[tuple[Optimizer, int, list[Tensor]]]] = {"l1": [], "l2": []}
        self._plan: list[str] = []

    def sparsity(self) -> dict[str, float]:
        """Share of exact zeros in every regularized parameter of the last fit."""
        return sparsity(self._weights)

    def explain(self) -> str:
        """Per group: what is folded into the step, and what is done in a pass of its own."""
        return "\n".join(self._plan)

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_twice(self, trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._weights = weights_of(pl_module) if self.exclude_bias_and_norm else _trained(pl_module)
        self._plan = []
        if not self._weights:
            raise ValueError(f"{type(self).__name__}(exclude_bias_and_norm=True): the module has no other parameters.")
        self._at_end(self._put_back)
        for optimizer in trainer.optimizers:
            self._take(optimizer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer, index, entry, ours, _ in self._folded:
            optimizer.param_groups[index][entry] = ours  # a checkpoint may have brought another
        for optimizer, _, _ in self._own["l1"]:
            refuse_folded_average(type(self).__name__, optimizer, "split the groups by ParameterGroups")
        if self._verbose:
            rank_zero_info(self.explain())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.loggers:
            shares = self.sparsity()
            zeros = sum(shares[name] * weight.numel() for name, weight in self._weights.items())
            total = sum(weight.numel() for weight in self._weights.values())
            pl_module.log("sparsity", zeros / total)
            pl_module.log_dict({f"sparsity/{name}": share for name, share in shares.items()})

    # --- what they do ---

    def _take(self, optimizer: Optimizer) -> None:
        weights = set(self._weights.values())
        for index, group in enumerate(optimizer.param_groups):
            taken = [param for param in group["params"] if param in weights]
            if taken:
                self._check(optimizer, index, group)
                is_whole = len(taken) == len(group["params"])
                where = [
                    f"{name} {self._place(optimizer, index, entry, name, taken, is_folded)}"
                    for name, entry, is_folded in (
                        ("l1", "l1", is_whole and isinstance(optimizer, OnePassOptimizer)),
                        ("l2", "weight_decay", is_whole and bool(group.get("decoupled_weight_decay"))),
                    )
                    if getattr(self, name)
                ]
                which = f"{len(taken)} of {len(group['params'])} parameters"
                self._plan.append(f"ElasticNet: {type(optimizer).__name__}, group {index}, {which}: {', '.join(where)}")
        if any(owner is optimizer for owner, _, _ in self._own["l2"]):
            self._at_end(before_update(type(self).__name__, optimizer, self._decay).remove)
        if any(owner is optimizer for owner, _, _ in self._own["l1"]):
            self._at_end(after_update(optimizer, self._threshold).remove)

    def _place(
        self, optimizer: Optimizer, index: int, entry: str, name: str, taken: list[Tensor], is_folded: bool
    ) -> str:
        strength, group = getattr(self, name), optimizer.param_groups[index]
        if not is_folded:
            self._own[name].append((optimizer, index, taken))
            return f"{strength:g} in its own pass"
        self._folded.append((optimizer, index, entry, strength, group[entry]))
        group[entry] = strength
        return f"{strength:g} in the step"

    def _check(self, optimizer: Optimizer, index: int, group: dict[str, Any]) -> None:
        for name, entry in (("l1", "l1"), ("l2", "weight_decay")):
            there = float(group.get(entry, 0.0))
            if getattr(self, name) and there:
                raise ValueError(
                    f"{type(self).__name__}({name}={getattr(self, name):g}): group {index} of "
                    f"{type(optimizer).__name__} has "
                    f"{entry}={there:g} already; use one of the two."
                )
        if "lr" not in group:
            raise ValueError(
                f"{type(self).__name__}(...): group {index} of {type(optimizer).__name__} has no learning rate."
            )

    @torch.no_grad()
    def _decay(self, optimizer: Optimizer) -> None:
        for lr, params in self._of(optimizer, "l2"):
            for param in params:
                param.mul_(1.0 - lr * self.l2)

    def _threshold(self, optimizer: Optimizer) -> None:
        for lr, params in self._of(optimizer, "l1"):
            soft_threshold_(params, lr * self.l1)

    def _of(self, optimizer: Optimizer, name: str) -> Iterator[tuple[float, list[Tensor]]]:
        """What is done here for `optimizer`: learning rate, and the parameters that it updates."""
        for owner, index, params in self._own[name]:
            if owner is optimizer:
                lr = float(optimizer.param_groups[index]["lr"])
                yield lr, [param for param in params if param.grad is not None]

    def _put_back(self) -> None:
        for optimizer, index, entry, _, users in self._folded:
            if entry in optimizer.param_groups[index]:  # Fuse may have taken its entries out before
                optimizer.param_groups[index][entry] = users

    def _release(self) -> None:
        self._folded, self._own = [], {"l1": [], "l2": []}  # `sparsity` can be asked after the fit

    def _forget(self) -> None:
        self._release()
        self._weights = {}


def _trained(module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: param for name, param in module.named_parameters() if param.requires_grad}
