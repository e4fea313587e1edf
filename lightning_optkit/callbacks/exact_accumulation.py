# SPDX-License-Identifier: Apache-2.0
"""Accumulated gradients that equal the gradient of one large batch, whatever the sizes of its parts."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_optkit._checks import check_callable, check_in, check_int, check_state
from lightning_optkit._torch_private import foreach_mul_
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_private import accumulates
from lightning_optkit.step.shards import local

__all__ = ["ExactAccumulation"]


class ExactAccumulation(FitCallback):
    """Weights every batch of an accumulation window by its number of samples or tokens, over all processes.

    Lightning divides each loss by `accumulate_grad_batches`, even in a last window of fewer batches, and gives small
    batches the weight of large ones. With this callback the step uses the gradient of the mean over all samples (or
    tokens) of the window, for losses that are means over their batch. Under DDP the mean is over the samples of all
    processes. The `loss` that `on_train_batch_end` receives includes the batch's weight, in parts of the first one.

    Args:
        weight: Returns the number of items in the mean of a batch's loss, e.g. of tokens that are not padding; batch ->
            number. None counts samples.

    Raises:
        TypeError: if `weight` is neither None nor callable.
        ValueError: at the start of a fit, with manual optimization or a strategy that accumulates itself, or with
            another callback that weights the batches.

    Example:
        >>> tokens = ExactAccumulation(weight=lambda batch: (batch["labels"] != -100).sum())
        >>> trainer = pl.Trainer(callbacks=[tokens], accumulate_grad_batches=4, logger=False)
    """

    def __init__(self, weight: Callable[[Any], float] | Callable[[Any], Tensor] | None = None) -> None:
        if weight is not None:
            check_callable(type(self).__name__, "weight", weight, "weight(batch)")
        self.weight = weight
        self._reference: float | None = None  # the first weight of the run: a scale for weighted losses
        self._window: dict[int, Tensor] = {}  # weights by batch; a closure called twice counts once

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self._reference, "window": {index: float(w) for index, w in self._window.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        owner = type(self).__name__
        state = check_state(owner, state_dict, reference=(float, int, type(None)), window=dict)
        if state["reference"] is not None:
            check_in(f"{owner}.load_state_dict", "state_dict['reference']", state["reference"], "(0, inf)")
        for index, weight in state["window"].items():
            check_int(f"{owner}.load_state_dict", "state_dict['window']", index, minimum=0)
            check_in(f"{owner}.load_state_dict", "state_dict['window']", weight, "[0, inf)")
        self._reference = state["reference"]
        self._window = {index: torch.tensor(w, dtype=torch.float64) for index, w in state["window"].items()}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        name = type(self).__name__
        if not pl_module.automatic_optimization:
            raise ValueError(f"{name}(...): with manual optimization the module divides its losses itself.")
        if trainer.strategy.handles_gradient_accumulation:
            raise ValueError(f"{name}(...): {type(trainer.strategy).__name__} accumulates gradients by itself.")
        if others := callbacks_of(trainer, ExactAccumulation, but=self):
            raise ValueError(f"{name}(...) and {type(others[0]).__name__}(...): both weight the batches; give one.")
        self._reference, self._window = None, {}
        user_step = pl_module.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            output = user_step(*args, **kwargs)
            batch = args[0] if args else next(iter(kwargs.values()))
            return self._weighted(trainer, output, batch)

        # Lightning passes batch_idx only to a step whose signature has it.
        training_step.__wrapped__ = user_step  # type: ignore[attr-defined]
        self._override(pl_module, "training_step", training_step)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Before unscaling, clipping and every on_before_optimizer_step: they get the gradient of the mean.
        self._close_window(trainer, pl_module)

    # --- implementation ---

    def _close_window(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Divides the accumulated gradients by their total weight, if a step comes next."""
        if accumulates(trainer) or not self._window:
            return
        assert self._reference is not None
        total = torch.stack([weight.to(pl_module.device) for weight in self._window.values()]).sum()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(total)
        # DDP has averaged over the processes, Lightning has divided each loss. A window of weight 0 has no gradient.
        divided_by = trainer.world_size * trainer.accumulate_grad_batches
        factor = torch.where(total > 0, self._reference * divided_by / total, torch.zeros_like(total))
        # Some may be whole beside shards, which torch does not multiply in one call.
        grads = [local(p.grad) for p in pl_module.parameters() if p.grad is not None]
        if grads:
            foreach_mul_(grads, factor)

    def _weighted(self, trainer: pl.Trainer, output: Any, batch: Any) -> Any:
        loss = output.get("loss") if isinstance(output, Mapping) else output
        index = trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches
        if index == 0:
            self._window = {}
        if loss is None:  # no backward pass, and so no hook after it
            self._close_window(trainer, trainer.lightning_module)
            return output
        counted = extract_batch_size(batch) if self.weight is None else self.weight(batch)
        weight = torch.as_tensor(counted, dtype=torch.float64, device=loss.device)
        self._window[index] = weight
        if self._reference is None:
            first = weight.clone()
            if trainer.world_size > 1:
                torch.distributed.all_reduce(first)
            self._reference = float(first) / trainer.world_size or 1.0
        wide = loss if loss.dtype == torch.float64 else loss.float()  # a half-precision loss could overflow
        weighted = wide * (weight / self._reference).to(wide.dtype)
        return {**output, "loss": weighted} if isinstance(output, Mapping) else weighted
