# SPDX-License-Identifier: Apache-2.0
"""Measures the gradient noise scale during a run, and suggests a batch size."""

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_optkit._checks import check_bools, check_callable, check_int, check_numbers, check_state
from lightning_optkit.callbacks.augment import Augment
from lightning_optkit.callbacks.sam import SAM
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_packages import loss_scaler
from lightning_optkit.callbacks.seams.refusals import (
    refuse_manual_optimization,
    refuse_reentrant_checkpoints,
    refuse_split_parameters,
)
from lightning_optkit.callbacks.seams.repeated_step import repeatable
from lightning_optkit.callbacks.seams.run import Run, has_lazy_parameters
from lightning_optkit.data._mixing import Mixing
from lightning_optkit.diagnostics.measure.batches import tensors_of
from lightning_optkit.diagnostics.noise_scale import gradient_noise_scale

__all__ = ["NoiseScale"]

_RESAMPLES = 200
_CUT = (Tensor, list, tuple)  # a list of strings is one per sample, too
_NESTED = (Tensor, list, tuple, Mapping)


class NoiseScale(FitCallback):
    """Measures how many samples a batch needs before its gradient is more signal than noise.

    Every `every` steps the gradients of equal parts of the batch are taken besides the step's own, and compared with
    their mean. Batches smaller than the noise scale train in almost proportionally more steps; larger ones hardly save
    steps. It usually grows during a run, so it is averaged over the last `window` measurements. Nothing else changes:
    random numbers, BatchNorm's statistics, metrics, logs and weights are those of the run without it. What
    `training_step` changes elsewhere than in the module, the batch and the Trainer, or of its own in the weights of a
    compiled module, is changed once more for each part.

    The loss must be a mean over the samples of a batch. BatchNorm makes the samples of a part depend on one another,
    which biases the estimate. Each process measures its own batches (DDP), and two numbers are averaged over all.

    Attributes:
        scale: The noise scale in samples, infinite if no gradient stands out of the noise; None before the first
            measurement.
        interval: Its 5th and 95th percentile, by resampling the measurements; None before the second.
        suggestion: The power of two next to `scale`, of samples per step: over all processes and accumulated batches.

    Args:
        every: Optimizer steps from one measurement to the next, at least 1. The cost is that of `1 / every` of a
            training step's forward and backward pass.
        parts: Number of parts of a batch, at least 2. More parts are more accurate and need more launches.
        window: Measurements that are averaged, at least 1.
        split: Maps a batch and `parts` to a list of batches of equal size. Default: all tensors of the batch are cut
            along their first dimension, and lists with an entry per sample; samples that are left over are not used.
        log: Log `noise_scale` if there is a logger.
        verbose: Print the result after the fit.

    Raises:
        ValueError: for an argument out of range; when the fit starts, with manual optimization, with SAM and its
            variants (whose gradient is not that of the loss), with an `Augment` that mixes examples of a batch, and
            for a strategy that splits parameters; at the first measurement, for activations that are checkpointed with
            `use_reentrant=True`.
        RuntimeError: at the first measurement, if `training_step` does not run on a part of a batch.

    Source: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", arXiv:1812.06162, section 2.2 and
    Appendix A.1.

    Example:
        >>> trainer = pl.Trainer(callbacks=[NoiseScale(every=20)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        every: int = 20,
        parts: int = 2,
        window: int = 50,
        *,
        split: Callable[[Any, int], Sequence[Any]] | None = None,
        log: bool = True,
        verbose: bool = True,
    ) -> None:
        owner = type(self).__name__
        self.every = check_int(owner, "every", every, minimum=1)
        self.parts = check_int(owner, "parts", parts, minimum=2)
        self.window = check_int(owner, "window", window, minimum=1)
        if split is not None:
            check_callable(owner, "split", split, "split(batch, parts)")
        check_bools(owner, log=log, verbose=verbose)
        self.split, self._log, self.verbose = split, log, verbose  # `log` is a method that Lightning adds
        self._measured: deque[tuple[float, float]] = deque(maxlen=self.window)  # noise, squared gradient
        self._samples: int | None = None  # in a step
        self._is_checked, self._why_nothing = False, ""

    @property
    def scale(self) -> float | None:
        return _ratio(self._measured) if self._measured else None

    @property
    def interval(self) -> tuple[float, float] | None:
        if len(self._measured) < 2:
            return None
        draw = random.Random(0)
        several = [*self._measured]
        drawn = sorted(_ratio(draw.choices(several, k=len(several))) for _ in range(_RESAMPLES))
        return drawn[_RESAMPLES // 20], drawn[-_RESAMPLES // 20 - 1]

    @property
    def suggestion(self) -> int | None:
        scale = self.scale
        return None if scale is None or math.isinf(scale) else 2 ** round(math.log2(max(scale, 1.0)))

    def state_dict(self) -> dict[str, Any]:
        """The measurements."""
        return {"measured": [list(pair) for pair in self._measured]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the measurements."""
        owner = type(self).__name__
        pairs = check_state(owner, state_dict, measured=list)["measured"]
        where = f"{owner}.load_state_dict"
        checked = [check_numbers(where, "state_dict['measured']", pair, 2, "(-inf, inf)") for pair in pairs]
        self._measured = deque([(noise, square) for noise, square in checked], maxlen=self.window)

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_split_parameters(self, trainer)
        refuse_manual_optimization(self, pl_module, "NoiseScale repeats training_step, which would step")
        for other in callbacks_of(trainer, SAM):
            name = type(other).__name__
            raise ValueError(f"{type(self).__name__}(...): {name} trains with another gradient; measure without it.")
        for augment in callbacks_of(trainer, Augment):
            for module in augment.augmentations:
                if isinstance(module, Mixing):
                    raise ValueError(
                        f"{type(self).__name__}(...): {type(module).__name__} mixes whole batches, and parts "
                        "of one are measured; measure without it."
                    )
        self._measured.clear()
        self._samples, self._is_checked, self._why_nothing = None, False, "no step was due"

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        run, accumulated = Run(trainer), trainer.accumulate_grad_batches
        if run.step % self.every or batch_idx % accumulated or has_lazy_parameters(pl_module):
            return  # layers that wait for their first input draw their weights in the run's own step
        batches, size = self._parts_of(batch)
        found = torch.full((2,), math.nan, device=pl_module.device)
        if size:
            params = [param for param in run.parameters if param.requires_grad]
            with repeatable(trainer, pl_module) as loss_of_part:
                losses = (partial(loss_of_part, part, batch_idx) for part in batches)
                gradients = self._gradients(trainer, params, losses)
                measured = gradient_noise_scale(gradients, size)
            if measured.noise or measured.gradient_square:
                found = torch.tensor([measured.noise, measured.gradient_square], device=pl_module.device)
                self._why_nothing = "gradients were infinite or NaN"
            else:
                self._why_nothing = "all gradients were zero; does training_step return a loss?"
            self._samples = size * self.parts * accumulated * run.replicas
        else:
            self._why_nothing = f"it needs batches of {self.parts} samples"
        # All processes, also one whose last batch is too small: or the others would wait for it.
        mean = trainer.strategy.reduce(found, reduce_op="mean")
        noise, square = mean.tolist()
        if math.isfinite(noise) and math.isfinite(square):
            self._measured.append((noise, square))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        scale = self.scale
        if self._log and trainer.loggers and scale is not None and math.isfinite(scale):
            pl_module.log("noise_scale", scale, batch_size=1)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._measured:
            rank_zero_warn(f"{type(self).__name__}(...): nothing was measured; {self._why_nothing}.")
        elif self.verbose:
            rank_zero_info(self._text())

    # --- implementation ---

    def _parts_of(self, batch: Any) -> tuple[Iterator[Any], int]:
        """The parts of the batch, and the number of samples in each; 0 if there are too few."""
        if self.split is not None:
            parts = [*self.split(batch, self.parts)]
            if len(parts) != self.parts:
                raise ValueError(
                    f"{type(self).__name__}(split=...): split must return {self.parts} batches, not {len(parts)}."
                )
            return iter(parts), _num_samples(parts[0])
        samples = _num_samples(batch)
        if not samples:
            raise ValueError(
                f"{type(self).__name__}(split=None): a batch of type {type(batch).__name__} has no tensors that could "
                "be cut; pass split=lambda batch, parts: [...]."
            )
        size = samples // self.parts

        def cut(value: Any, place: int) -> Any:
            if isinstance(value, Tensor):
                whole = value.dim() > 0 and len(value) == samples
            else:
                whole = len(value) == samples and not any(isinstance(each, _NESTED) for each in value)
            if whole:
                return value[place * size : (place + 1) * size]
            if isinstance(value, Tensor):
                return value
            parts = [apply_to_collection(each, _CUT, cut, place) for each in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)

        return (apply_to_collection(batch, _CUT, cut, place) for place in range(self.parts)), size

    def _gradients(
        self, trainer: pl.Trainer, params: list[Tensor], losses: Iterator[Callable[[], Tensor | None]]
    ) -> Iterator[list[Tensor | None]]:
        scaler = loss_scaler(trainer)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        for loss_of_part in losses:
            try:
                loss = loss_of_part()
            except Exception as error:
                raise RuntimeError(
                    f"{type(self).__name__}(split={self.split!r}): training_step could not be run on a part of a batch "
                    f"({error}); pass split=lambda batch, parts: [...], which returns smaller batches."
                ) from error
            if loss is None or not params:
                yield [None] * len(params)
                continue
            if not self._is_checked:
                refuse_reentrant_checkpoints(self, loss)
                self._is_checked = True
            with torch.autocast(loss.device.type, enabled=False):
                found = torch.autograd.grad(loss * scale, params, allow_unused=True)  # or fp16 would underflow
            yield [None if grad is None else grad / scale for grad in found]

    def _text(self) -> str:
        owner, scale, samples = type(self).__name__, self.scale, self._samples
        assert scale is not None
        if math.isinf(scale):
            return f"{owner}: no gradient stands out of the noise in {len(self._measured)} measurements."
        interval = self.interval
        spread = "" if interval is None else f" ({interval[0]:.3g} to {interval[1]:.3g})"
        text = f"{owner}: {scale:.3g} samples{spread}, measured {len(self._measured)} times"
        if samples is None:
            return f"{text}."
        if samples * 2 <= scale:
            advice = f"larger steps, up to about {self.suggestion}, would save almost as many steps as they are larger"
        elif samples >= scale * 2:
            advice = f"steps of about {self.suggestion} would need fewer samples in all"
        else:
            advice = "a good compromise of steps and samples"
        return f"{text}; a step has {samples}: {advice}."


def _ratio(measured: Sequence[tuple[float, float]]) -> float:
    """Of means: single measurements may be negative."""
    noise, square = (sum(values) for values in zip(*measured, strict=True))
    return max(noise, 0.0) / square if square > 0 else math.inf


def _num_samples(batch: Any) -> int:
    return next((len(tensor) for tensor in tensors_of(batch) if tensor.dim()), 0)
