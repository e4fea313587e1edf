# SPDX-License-Identifier: Apache-2.0
"""R-Drop with an unchanged module: every batch runs twice with different dropout, and differences are penalized."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_optkit._checks import check_in
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.losses import WATCHING, Loss, LossCall, intercept, release
from lightning_optkit.callbacks.seams.refusals import refuse_manual_optimization, refuse_twice
from lightning_optkit.callbacks.seams.second_pass import SecondPass, finish_second_passes, loss_of, with_loss
from lightning_optkit.regularization.r_drop import r_drop

__all__ = ["RDrop"]


class RDrop(FitCallback):
    r"""Adds to the loss the divergence of two forward passes with different dropout.

    .. math:: \tfrac{1}{2}(L_1 + L_2) + \alpha\, \tfrac{1}{2}\left(D_{KL}(P_1 \| P_2) + D_{KL}(P_2 \| P_1)\right)

    `training_step` runs twice on the batch; the logits are the inputs of its classification loss (`cross_entropy`,
    `nll_loss` or the binary ones). Several losses add up, and targets at `ignore_index` do not count. One backward pass
    covers both runs. The mean of the two losses keeps the module's scale, as in the authors' code; the paper adds them,
    so its alpha is twice this one.

    The second run has no side effects: BatchNorm's statistics, metrics and `self.log` are those of the first.

    Cost: twice the forward time and activation memory.

    Args:
        alpha: Weight of the divergence, in (0, inf); 0.5 to 5 are common.

    Raises:
        ValueError: if `alpha` is out of range; when the fit starts, for manual optimization.
        RuntimeError: after the first `training_step`, if its loss cannot be intercepted.

    Source: Liang et al. 2021, arXiv:2106.14448, Section 2.

    Example:
        >>> trainer = pl.Trainer(callbacks=[RDrop(alpha=1.0)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = check_in(type(self).__name__, "alpha", alpha, "(0, inf)")
        self._calls: list[LossCall] = []
        self._is_checked = False

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_twice(self, trainer)
        refuse_manual_optimization(self, pl_module, "RDrop must know which loss is passed back")
        self._is_checked = False
        intercept(pl_module, type(self).__name__, self._watch, WATCHING)
        self._at_end(partial(release, pl_module, self._watch))
        self._override(pl_module, "training_step", self._wrap_training_step(pl_module))
        self._override(pl_module, "backward", self._wrap_backward(pl_module))
        self._at_end(partial(finish_second_passes, pl_module))

    # --- implementation ---

    def _watch(self, call: LossCall, loss: Loss) -> Tensor:
        # Mixup computes the loss of one prediction twice.
        if not any(call.input is seen.input for seen in self._calls):
            self._calls.append(call)
        return loss(call)

    def _wrap_training_step(self, pl_module: pl.LightningModule) -> Callable[..., Any]:
        original = pl_module.training_step

        @wraps(original)  # Lightning inspects the signature
        def training_step(*args: Any, **kwargs: Any) -> Any:
            output, calls = self._pass(original, args, kwargs)
            loss = loss_of(output)
            if loss is None:
                return output
            with SecondPass(pl_module):
                other_output, other_calls = self._pass(original, args, kwargs)
            other = loss_of(other_output)
            assert other is not None
            divergence = _divergence(calls, other_calls)
            self._check(divergence)
            return with_loss(output, 0.5 * (loss + other) + self.alpha * divergence)

        return training_step

    def _pass(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[LossCall]]:
        self._calls = []
        output = original(*args, **kwargs)
        calls, self._calls = self._calls, []
        return output, calls

    def _wrap_backward(self, pl_module: pl.LightningModule) -> Callable[..., None]:
        original = pl_module.backward

        @wraps(original)
        def backward(*args: Any, **kwargs: Any) -> None:
            try:
                original(*args, **kwargs)
            finally:
                finish_second_passes(pl_module)

        return backward

    def _check(self, divergence: Tensor) -> None:
        """Checked only once, since it synchronizes."""
        if not self._is_checked and float(divergence.detach()) == 0.0:
            rank_zero_warn(
                f"{type(self).__name__}(): the two passes agree exactly; the module has no dropout in training, "
                "or p is 0."
            )
        self._is_checked = True

    def _forget(self) -> None:
        self._calls = []


def _divergence(calls: list[LossCall], others: list[LossCall]) -> Tensor:
    if len(calls) != len(others):
        raise RuntimeError(f"RDrop(): one pass computed {len(calls)} losses, the other {len(others)}.")
    terms = [_term(call, other) for call, other in zip(calls, others, strict=True)]
    return sum(terms[1:], terms[0])


def _term(call: LossCall, other: LossCall) -> Tensor:
    """The divergence of one loss, reduced like the loss."""
    dim = 0 if call.input.dim() == 1 else 1
    logits, others = call.input, other.input
    if call.name == "binary_cross_entropy":
        logits, others = logits.logit(1e-6), others.logit(1e-6)
    each = r_drop(logits, others, binary=call.is_binary, reduction="none", dim=dim)
    if call.has_soft_target:
        return each.sum() if call.reduction == "sum" else each.mean()
    counted = call.target != call.ignore_index
    total = (each * counted).sum()
    return total if call.reduction == "sum" else total / counted.sum()
