# SPDX-License-Identifier: Apache-2.0
"""SAM whose second gradient is taken for every k-th batch, with automatic optimization."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_optkit._checks import check_in, check_int, check_state, check_tensor
from lightning_optkit._norms import total_norm
from lightning_optkit.callbacks._combined_gradient import (
    CombinedGradientSAM,
    Gradients,
    trained_parameters,
    with_gradient,
)
from lightning_optkit.callbacks.seams.second_pass import finish_second_passes, loss_of, with_loss
from lightning_optkit.regularization.look_sam import look_sam, look_sam_direction
from lightning_optkit.step.shards import distribute_like, unsharded

__all__ = ["LookSAM"]


class LookSAM(CombinedGradientSAM):
    """Sharpness-aware as SAM in every k-th batch; others reuse a part of its gradient, see `regularization.look_sam`.

    As `SAM` in everything else. The batches are counted over the fit, and the count and the direction are saved.

    With `sync=False` each process has a direction of its own: `ExactResume` saves all of them, a checkpoint without it
    that of the first.

    Cost: 1 / k of the additional time of SAM, and a copy of the gradients.

    Args:
        rho: Radius, in (0, inf). Default: 0.05; 0.5 if `adaptive`.
        k: Batches per second gradient, at least 1. 1: SAM.
        alpha: Length of the reused direction relative to the gradient, in [0, inf).
        adaptive: ASAM: scale the radius by the weights.
        eta: For ASAM, added to the magnitude of a weight, in [0, inf).
        sync: Average the ascent over all processes.

    Raises:
        ValueError: as `SAM`.

    Source: Liu et al. 2022, arXiv:2203.02714, Algorithm 1.

    Example:
        >>> trainer = pl.Trainer(callbacks=[LookSAM(k=5)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        rho: float | None = None,
        k: int = 5,
        alpha: float = 0.7,
        adaptive: bool = False,
        eta: float = 0.01,
        sync: bool = False,
    ) -> None:
        super().__init__(rho, adaptive, eta, sync)
        self.k = check_int(type(self).__name__, "k", k, minimum=1)
        self.alpha = check_in(type(self).__name__, "alpha", alpha, "[0, inf)")
        self._num_batches = 0
        self._direction: Gradients = []  # of the last batch with two gradients

    def state_dict(self) -> dict[str, Any]:
        """The number of batches, and the direction that is reused."""
        whole = [None if t is None else unsharded(t) for t in self._direction]
        return {"num_batches": self._num_batches, "direction": whole}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state."""
        owner = f"{type(self).__name__}.load_state_dict"
        checked = check_state(type(self).__name__, state_dict, num_batches=int, direction=list)
        self._num_batches = check_int(owner, "state_dict['num_batches']", checked["num_batches"], minimum=0)
        for place, t in enumerate(checked["direction"]):
            if t is not None:
                check_tensor(owner, f"state_dict['direction'][{place}]", t, "inexact")
        self._direction = checked["direction"]

    def own_direction(self) -> dict[int, Tensor]:
        """The parts of the direction that are of this process alone, by place, for `ExactResume`; empty for None."""
        parts = {place: torch.empty(0) if t is None else t for place, t in enumerate(self._direction)}
        return {place: t for place, t in parts.items() if not isinstance(t, DTensor)}  # which are of the mean gradient

    def set_own_direction(self, parts: dict[int, Tensor]) -> None:
        """Puts parts of `own_direction` into the direction that was loaded, which is that of one process."""
        own: dict[int, Tensor | None] = {place: t if t.numel() else None for place, t in parts.items()}
        self._direction = [own.get(place, t) for place, t in enumerate(self._direction)]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._num_batches, self._direction = 0, []

    @override
    def _step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, run: Callable[[], Any]) -> Any:
        is_full = self._num_batches % self.k == 0 or not _fits(self._direction, trained_parameters(trainer))
        self._num_batches += 1
        if is_full:
            return super()._step(trainer, pl_module, run)
        output = run()
        loss, params = loss_of(output), trained_parameters(trainer)
        if loss is None or not params:
            return output
        grads = self._unscaled(trainer, params, loss)
        finish_second_passes(pl_module)
        # This training step may have frozen a layer: the next one takes a second gradient.
        direction = self._direction if _fits(self._direction, params) else [None for _ in params]
        direction = [
            None if t is None else distribute_like(t.to(p.device), p) for t, p in zip(direction, params, strict=True)
        ]
        return with_loss(output, with_gradient(loss, params, look_sam(grads, direction, self.alpha)))

    def _combined(self, grads: Gradients, perturbed: Gradients) -> Gradients:
        direction = look_sam_direction(grads, perturbed)
        # One that has overflowed is not reused.
        is_finite = bool(total_norm([t for t in direction if t is not None]).isfinite())
        self._direction = direction if is_finite else [None for _ in direction]
        return perturbed


def _fits(direction: Gradients, params: list[Tensor]) -> bool:
    """Whether it is of these parameters; layers may have been frozen or replaced since."""
    return len(direction) == len(params) and all(
        t is None or t.shape == p.shape for t, p in zip(direction, params, strict=True)
    )
