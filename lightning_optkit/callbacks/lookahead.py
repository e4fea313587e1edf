# SPDX-License-Identifier: Apache-2.0
"""Lookahead around any optimizer of a run."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_optkit._checks import check_in, check_int, check_state, check_tensor
from lightning_optkit.averaging.lookahead import lookahead_
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.refusals import refuse_all_but_dtensors, refuse_twice
from lightning_optkit.callbacks.seams.steps import StepCounts, StepListener, refuse_folded_average, watch_steps
from lightning_optkit.step.shards import distribute_like, reshard, unsharded

__all__ = ["Lookahead"]


class Lookahead(FitCallback):
    """Every `k` optimizer steps, pulls the weights back to slow weights, which have moved a share toward them.

    It works with any optimizer, also with `Fuse`, and leaves the moments alone (the paper's "maintain"). The slow
    weights and the counts are saved. Between two pulls the module holds the fast weights: evaluate where the steps of
    an epoch are a multiple of `k`, or average the weights (`WeightAveraging`, without `Fuse`).

    Args:
        k: Steps between two pulls, at least 1; 5 to 10 in the paper.
        alpha: How far the slow weights move, in (0, 1].

    Raises:
        ValueError: for an argument out of range; when the fit starts, for a strategy other than a
            single device, DDP and FSDP2, or if a one-pass step would average before the pull.

    Cost: 4 bytes per parameter; every `k` steps a read and a write of both weights.

    Source: Zhang et al. 2019, arXiv:1907.08610, Algorithm 1.

    Example:
        >>> trainer = pl.Trainer(callbacks=[Lookahead(k=6, alpha=0.5)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, k: int = 5, alpha: float = 0.5) -> None:
        self.k = check_int(type(self).__name__, "k", k, minimum=1)
        self.alpha = check_in(type(self).__name__, "alpha", alpha, "(0, 1]")
        self._steps = StepCounts()
        self._slow: dict[str, Tensor] = {}  # by the name of the parameter

    def state_dict(self) -> dict[str, Any]:
        """The number of steps of each optimizer, and the slow weights."""
        return {"steps": self._steps.to_list(), "slow": {name: unsharded(kept) for name, kept in self._slow.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state."""
        owner = f"{type(self).__name__}.load_state_dict"
        checked = check_state(type(self).__name__, state_dict, steps=list, slow=dict)
        steps = [check_int(owner, "state_dict['steps']", step, minimum=0) for step in checked["steps"]]
        for name, kept in checked["slow"].items():
            check_tensor(owner, f"state_dict['slow'][{name!r}]", kept, "inexact")
        self._steps.load(steps)
        self._slow = dict(checked["slow"])

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_twice(self, trainer)
            refuse_all_but_dtensors(self, trainer)
            self._steps, self._slow = StepCounts(), {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps.begin(trainer)
        for optimizer in trainer.optimizers:
            refuse_folded_average(type(self).__name__, optimizer, "leave out Fuse, or the average")

        def pull(optimizer: Optimizer, place: int) -> None:
            self._pull(pl_module, optimizer, place)

        # Not earlier: with FSDP2, torch makes room for a checkpoint by an empty step, which is none of the run.
        self._at_end(watch_steps(trainer, StepListener(type(self).__name__, after=pull)).remove)

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        reshard(pl_module)  # an evaluation may have left the parameters gathered
        for name, param in pl_module.named_parameters():
            kept = self._slow.get(name)
            if kept is None or kept.shape != param.shape:
                dtype = torch.promote_types(param.dtype, torch.float32)
                self._slow[name] = param.detach().to(dtype, copy=True)
            elif kept.device != param.device or isinstance(kept, DTensor) != isinstance(param, DTensor):
                self._slow[name] = distribute_like(kept, param).to(param.device, copy=True)  # of a checkpoint

    # --- implementation ---

    def _pull(self, pl_module: pl.LightningModule, optimizer: Optimizer, place: int) -> None:
        if self._steps.add(place) % self.k:
            return
        stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
        named = {name: p for name, p in pl_module.named_parameters() if id(p) in stepped and name in self._slow}
        lookahead_(list(named.values()), [self._slow[name] for name in named], self.alpha)
