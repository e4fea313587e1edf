# SPDX-License-Identifier: Apache-2.0
"""Augments training batches on the device, and mixes the loss if examples were mixed.

Source: Zhang et al. 2018, arXiv:1710.09412 (a mixture of targets is a mixture of cross-entropies); Yun et al. 2019,
arXiv:1905.04899 (CutMix).
"""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_instance, check_int, check_listed, shown
from lightning_optkit.callbacks.seams.batch_fields import Field, check_field, field_of, with_field
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_private import batch_progress
from lightning_optkit.callbacks.seams.losses import TARGETS, Loss, LossCall, intercept, release
from lightning_optkit.callbacks.seams.refusals import refuse_listed_twice
from lightning_optkit.callbacks.seams.smoothed_call import smoothed_call
from lightning_optkit.data._draws import Draws
from lightning_optkit.data._mixing import Mixing
from lightning_optkit.data._targets import mixed, per_example, smoothed

__all__ = ["Augment"]


class _Mixture(NamedTuple):
    """How the current batch was mixed: share * examples + (1 - share) * partners."""

    by: Mixing
    partners: Tensor
    share: float | Tensor


class Augment(FitCallback):
    """Applies augmentations to the inputs of every training batch; other stages get the data unchanged.

    `Mixup`, `CutMix` and `MixupOrCutMix` mix pairs of examples. Class indices stay class indices, so that metrics in
    `training_step` keep working: every loss computed there by `F.cross_entropy` or a similar function becomes share *
    loss(targets) + (1 - share) * loss(targets of the partners), which equals cross-entropy with soft targets for any
    weights, `ignore_index` or label smoothing. Floating-point targets (regression, soft targets) are mixed in the
    batch. With a share for every example, a mean is that of the examples' losses times their shares, divided as the
    function does. The `label_smoothing` of the augmentation is applied to the mixed targets. If `training_step`
    computes its loss from class indices in another way, it raises.

    The random numbers of training batch t on rank r depend only on `seed + r` and t: the run's own are not affected,
    and a resumed run continues with those of its next batch. List this callback after `Preprocess`.

    Args:
        augmentations: Augmentations of `lightning_optkit.data`, or custom modules from inputs to inputs, applied in
            order. If several mix examples, one of them is drawn for every batch.
        inputs: Field of the inputs, see `Preprocess`: (N, C, H, W) for images.
        targets: Field of the targets, used only where examples are mixed.
        seed: Seed of all draws, in [0, inf).

    Raises:
        TypeError: if an augmentation is not a module.
        ValueError: if there is none, or a batch lacks a field.
        RuntimeError: if examples were mixed and the loss cannot be intercepted.

    Cost: that of the augmentations; with mixing also a second evaluation of the loss function (not of the model).

    Source: Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899.

    Example:
        >>> from lightning_optkit.data import CutMix, Mixup, RandomHorizontalFlip
        >>> augment = Augment([RandomHorizontalFlip(), Mixup(0.2), CutMix()])
        >>> trainer = pl.Trainer(callbacks=[augment], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self, augmentations: nn.Module | Sequence[nn.Module], inputs: Field = 0, targets: Field = 1, seed: int = 0
    ) -> None:
        such_as = "an augmentation or several, such as Mixup(0.2)"
        modules = (
            [augmentations]
            if isinstance(augmentations, nn.Module)
            else check_listed(type(self).__name__, "augmentations", augmentations, such_as)
        )
        for module in modules:
            check_instance(type(self).__name__, "augmentations", module, nn.Module, such_as)
        self.augmentations = nn.ModuleList(modules).train()
        self.inputs, self._inputs = inputs, check_field(type(self).__name__, "inputs", inputs)
        self.targets, self._targets = targets, check_field(type(self).__name__, "targets", targets)
        mixes = any(isinstance(module, Mixing) for module in modules)
        if mixes and self._targets == self._inputs:
            raise ValueError(f"{type(self).__name__}(targets={targets!r}): targets must be another field than inputs.")
        self.seed = check_int(type(self).__name__, "seed", seed, minimum=0)
        self._generator = torch.Generator()
        self._mixture: _Mixture | None = None
        self._training = self._intercepts = False

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_listed_twice(self, trainer)
        for module in self.augmentations.modules():
            if isinstance(module, Draws):
                module.generator = self._generator  # one generator for all, so that none repeats the numbers of another
        inner = trainer.strategy.batch_to_device

        def batch_to_device(batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
            batch = inner(batch, device=device, dataloader_idx=dataloader_idx)
            return self._augment(trainer, pl_module, batch) if self._training and trainer.training else batch

        self._override(trainer.strategy, "batch_to_device", batch_to_device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not earlier: other callbacks may inspect batches, or fit transforms on them.
        self._training = True
        self.augmentations.to(pl_module.device)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._training = False

    # --- implementation ---

    @torch.no_grad()
    def _augment(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
        self._mixture = None
        inputs = field_of(type(self).__name__, "inputs", batch, self._inputs)
        progress = batch_progress(trainer)  # part of every checkpoint
        draw = random.Random(f"{self.seed + trainer.global_rank} {progress.total.processed}")
        self._generator.manual_seed(draw.getrandbits(62))
        mixing = [module for module in self.augmentations if isinstance(module, Mixing)]
        chosen = draw.choice(mixing) if mixing else None
        for module in self.augmentations:
            if module is chosen:
                inputs, partners, share = chosen.mix(inputs)
                self._mixture = _Mixture(chosen, partners, share)
            elif module not in mixing:
                inputs = module(inputs)
        if self._mixture is not None:
            batch = self._with_mixed_targets(pl_module, batch, self._mixture)
        return with_field(batch, self._inputs, inputs)

    def _with_mixed_targets(self, pl_module: pl.LightningModule, batch: Any, mixture: _Mixture) -> Any:
        targets = field_of(type(self).__name__, "targets", batch, self._targets)
        if not isinstance(targets, Tensor) or len(targets) != len(mixture.partners):
            found = f"shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(
                f"{type(self).__name__}(targets={shown(self.targets)}): targets must be a tensor with one target for "
                f"each of the {len(mixture.partners)} examples to be mixed, not {found}."
            )
        if targets.is_floating_point():
            self._mixture = None  # mixed here, so the loss must not mix them again
            soft = smoothed(mixture.by, mixed(targets, mixture.partners, mixture.share))
            return with_field(batch, self._targets, soft)
        if not self._intercepts:
            intercept(pl_module, type(self).__name__, self._mix_loss, TARGETS)
            self._at_end(partial(release, pl_module, self._mix_loss))
            self._intercepts = True
        return batch

    def _mix_loss(self, call: LossCall, loss: Loss) -> Tensor:
        if self._mixture is None:
            return loss(call)
        by, partners, share = self._mixture
        if len(call.target) != len(partners):
            raise RuntimeError(
                f"{type(self).__name__}(targets={shown(self.targets)}): {call.name} was given {len(call.target)} "
                f"targets for a batch of {len(partners)} mixed examples, and nobody can tell their partners; leave out "
                "Mixup and CutMix."
            )
        if by.label_smoothing:
            call = smoothed_call(type(by).__name__, "label_smoothing", by.label_smoothing, call)
        theirs = call.changed(target=call.target[partners])
        if isinstance(share, Tensor):
            return _weighted(call, share, loss) + _weighted(theirs, 1 - share, loss)
        return share * loss(call) + (1 - share) * loss(theirs)

    def _forget(self) -> None:
        self._mixture = None
        self._training = self._intercepts = False


def _weighted(call: LossCall, weights: Tensor, loss: Loss) -> Tensor:
    """The loss with every example's part multiplied by its weight (N,)."""
    each = loss(call.changed(reduction="none"))
    each = per_example(weights, each).to(each.dtype) * each
    if call.reduction == "none":
        return each
    return each.sum() if call.reduction == "sum" else each.sum() / call.num_averaged(each)
