# SPDX-License-Identifier: Apache-2.0
"""Keeps the incoming weights of every unit within a ball, after every optimizer step."""

from fnmatch import fnmatchcase
from functools import partial

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optkit._checks import check_in, check_pattern
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_private import key_of_state
from lightning_optkit.callbacks.seams.refusals import refuse_all_but_dtensors, refuse_twice
from lightning_optkit.callbacks.seams.run import has_lazy_parameters
from lightning_optkit.callbacks.seams.steps import StepListener, refuse_folded_average, was_updated, watch_steps
from lightning_optkit.regularization.max_norm import max_norm_
from lightning_optkit.regularization.weights_of import weights_of

__all__ = ["MaxNorm"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class MaxNorm(FitCallback):
    """After every optimizer step, scales the incoming weights of each unit whose norm exceeds `max_norm` down to it.

    A unit is an output of a linear layer, a filter of a convolution, or a row of an embedding. Biases and normalization
    layers are skipped. An average of the weights (`WeightAveraging`) uses the projected weights.

    Args:
        max_norm: Largest norm, in (0, inf).
        names: Shell pattern of parameter names, e.g. "head.*". Default: every weight.

    Raises:
        ValueError: for an argument out of range; when the fit starts, if no weight has such a name, for a strategy
            other than a single device, DDP and FSDP2, or if a one-pass step would average before the projection.

    Cost: a read and a write of the weights.

    Source: Hinton et al. 2012, arXiv:1207.0580; Srivastava et al. 2014, Section 5.1.

    Example:
        >>> trainer = pl.Trainer(callbacks=[MaxNorm(3.0)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, max_norm: float = 3.0, names: str = "*") -> None:
        self.max_norm = check_in(type(self).__name__, "max_norm", max_norm, "(0, inf)")
        self.names = check_pattern(type(self).__name__, "names", names)
        self._dims: dict[Tensor, int | None] = {}  # per parameter: dimension of its output units; None: skipped

    @property
    def state_key(self) -> str:
        """Separate states, since several may be used for different layers."""
        return key_of_state(self, names=self.names)

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            if any(other.names == self.names for other in callbacks_of(trainer, MaxNorm, but=self)):
                refuse_twice(self, trainer)
            refuse_all_but_dtensors(self, trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not any(fnmatchcase(name, self.names) for name in self._candidates(pl_module)):
            raise ValueError(f"{type(self).__name__}(names={self.names!r}): no weight of the module has such a name.")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            refuse_folded_average(type(self).__name__, optimizer, "leave out Fuse, or the average")
        # Not earlier: with FSDP2, torch makes room for a checkpoint by an empty step, which is none of the run.
        project = partial(self._project, pl_module)
        self._at_end(watch_steps(trainer, StepListener(type(self).__name__, after=project)).remove)

    # --- implementation ---

    @staticmethod
    def _candidates(pl_module: pl.LightningModule) -> list[str]:
        """Names of weights, now or later trainable; of all parameters if shapes are not known yet."""
        if has_lazy_parameters(pl_module):
            return [name for name, _ in pl_module.named_parameters()]
        return list(weights_of(pl_module, frozen=True))

    def _project(self, pl_module: pl.LightningModule, optimizer: Optimizer, place: int) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param not in self._dims:
                    self._look_at(pl_module)
                dim = self._dims.setdefault(param, None)
                if dim is not None and was_updated(optimizer, param):
                    max_norm_([param], self.max_norm, dim)

    def _look_at(self, pl_module: pl.LightningModule) -> None:
        transposed = {layer.weight for layer in pl_module.modules() if isinstance(layer, _TRANSPOSED)}
        named = {p: name for name, p in weights_of(pl_module, frozen=True).items() if fnmatchcase(name, self.names)}
        self._dims = {p: int(p in transposed) if p in named else None for p in pl_module.parameters()}

    def _forget(self) -> None:
        self._dims = {}
