# SPDX-License-Identifier: Apache-2.0
"""Smooths the targets of the training loss of an unchanged module."""

from functools import partial

import lightning.pytorch as pl
from torch import Tensor

from lightning_optkit._checks import check_in
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.losses import SMOOTHING, Loss, LossCall, intercept, release
from lightning_optkit.callbacks.seams.refusals import refuse_twice
from lightning_optkit.callbacks.seams.smoothed_call import smoothed_call

__all__ = ["LabelSmoothing"]


class LabelSmoothing(FitCallback):
    """Training computes its cross entropy with smoothed targets; validation and test are not affected.

    The loss equals that of `torch.nn.CrossEntropyLoss(label_smoothing=smoothing)` with the module's own class weights,
    `ignore_index` and reduction, for class indices and for soft targets (after Mixup); the same for `NLLLoss`. For
    `BCEWithLogitsLoss` and `BCELoss` every target is moved toward 1/2: `y * (1 - smoothing) + smoothing / 2`.

    Metrics that `training_step` computes itself use the module's own targets. The loss itself costs the same;
    intercepting it costs about 1.7 us per torch call inside `training_step`.

    Args:
        smoothing: Fraction of each target that is spread evenly over all classes, in [0, 1).

    Raises:
        ValueError: for a smoothing out of range; in training, for a loss with its own smoothing, or a target that is
            not a probability.
        RuntimeError: after the first `training_step`, if it computed a regression loss or a custom one.

    Source: Szegedy et al. 2016, arXiv:1512.00567, Section 7.

    Example:
        >>> trainer = pl.Trainer(callbacks=[LabelSmoothing(0.1)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        self.smoothing = check_in(type(self).__name__, "smoothing", smoothing, "[0, 1)")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_twice(self, trainer)
            intercept(pl_module, type(self).__name__, self._smooth, SMOOTHING)
            self._at_end(partial(release, pl_module, self._smooth))

    def _smooth(self, call: LossCall, loss: Loss) -> Tensor:
        return loss(smoothed_call(type(self).__name__, "smoothing", self.smoothing, call))
