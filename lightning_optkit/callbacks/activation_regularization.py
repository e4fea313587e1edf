# SPDX-License-Identifier: Apache-2.0
"""Adds penalties on the size of chosen activations, and on their change over time, to the training loss."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_optkit._checks import check_in, check_pattern, check_whole
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.named_modules import first_tensor, modules_named
from lightning_optkit.callbacks.seams.refusals import refuse_listed_twice, refuse_manual_optimization
from lightning_optkit.callbacks.seams.second_pass import loss_of, with_loss
from lightning_optkit.regularization.activation_regularization import (
    activation_regularization,
    temporal_activation_regularization,
)

__all__ = ["ActivationRegularization"]


class ActivationRegularization(FitCallback):
    """Adds AR on the outputs of the modules `names`, and TAR on those of `temporal_names`, to the loss.

    In the paper both apply to the last recurrent layer: AR after its dropout, TAR before it. The time dimension of a
    recurrent layer follows from `batch_first`. If a module runs several times in a `training_step`, its mean counts.

    Args:
        names: Shell pattern of the modules whose outputs should be small, e.g. "decoder.dropout"; `*` does not match a
            dot.
        temporal_names: Pattern of those whose outputs should change slowly, e.g. "decoder.lstm". Default: the same.
        alpha: Weight of AR, in [0, inf).
        beta: Weight of TAR, in [0, inf).
        time_dim: Time dimension in the outputs of other modules.

    Raises:
        ValueError: for an argument out of range or two that are 0; when the fit starts, if no module has such a name,
            or with manual optimization.

    Source: Merity et al. 2017, arXiv:1708.01009, Section 3.

    Example:
        >>> regularization = ActivationRegularization("lstm", alpha=2.0, beta=1.0)
        >>> trainer = pl.Trainer(callbacks=[regularization], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self, names: str, temporal_names: str | None = None, alpha: float = 2.0, beta: float = 1.0, time_dim: int = 1
    ) -> None:
        self.alpha = check_in(type(self).__name__, "alpha", alpha, "[0, inf)")
        self.beta = check_in(type(self).__name__, "beta", beta, "[0, inf)")
        if alpha == beta == 0:
            raise ValueError(f"{type(self).__name__}(alpha=0, beta=0): one of them must be greater than 0.")
        self.names = check_pattern(type(self).__name__, "names", names)
        self.temporal_names = check_pattern(
            type(self).__name__, "temporal_names", names if temporal_names is None else temporal_names
        )
        self.time_dim = check_whole(type(self).__name__, "time_dim", time_dim)
        self._terms: dict[tuple[str, str], list[Tensor]] | None = None  # during training_step

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_listed_twice(self, trainer)
            refuse_manual_optimization(self, pl_module, "the loss that is passed back is its own")
            self._override(pl_module, "training_step", self._wrap(pl_module))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.alpha:
            named = modules_named(type(self).__name__, "names", pl_module, self.names)
            for name, module in named.items():
                self._at_end(module.register_forward_hook(self._small(name)).remove)
        if self.beta:
            named = modules_named(type(self).__name__, "temporal_names", pl_module, self.temporal_names)
            for name, module in named.items():
                self._at_end(module.register_forward_hook(self._slow(name)).remove)

    # --- implementation ---

    def _wrap(self, pl_module: pl.LightningModule) -> Callable[..., Any]:
        original = pl_module.training_step

        @wraps(original)  # Lightning inspects the signature
        def training_step(*args: Any, **kwargs: Any) -> Any:
            self._terms = {}
            try:
                output = original(*args, **kwargs)
                terms = [sum(each[1:], each[0]) / len(each) for each in self._terms.values()]
            finally:
                self._terms = None
            loss = loss_of(output)
            return output if loss is None else with_loss(output, sum(terms, loss))

        return training_step

    def _small(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._terms is not None:
                activations = first_tensor(type(self).__name__, name, output)
                self._terms.setdefault((name, "AR"), []).append(activation_regularization(activations, self.alpha))

        return hook

    def _slow(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._terms is not None:
                activations = first_tensor(type(self).__name__, name, output)
                time_dim = int(module.batch_first) if isinstance(module, nn.RNNBase) else self.time_dim
                term = temporal_activation_regularization(activations, self.beta, time_dim)
                self._terms.setdefault((name, "TAR"), []).append(term)

        return hook

    def _forget(self) -> None:
        self._terms = None
