# SPDX-License-Identifier: Apache-2.0
"""Initializes the parameters of an unchanged module before training, and shows the effect on the signal."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_optkit._checks import check_bools, check_callable, check_int, check_text, shown
from lightning_optkit.callbacks.seams.dry_run import materialize, run_training_step
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_packages import is_a
from lightning_optkit.callbacks.seams.lightning_private import before_batch_transfer
from lightning_optkit.callbacks.seams.mup_groups import split_by_multiplier
from lightning_optkit.callbacks.seams.refusals import refuse_twice
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.callbacks.seams.training_set import TrainingSet
from lightning_optkit.init import (
    ActivationRow,
    InitRow,
    MupRow,
    Scheme,
    activation_statistics,
    initialize,
    mup_width,
    render_activations,
)
from lightning_optkit.init._layout import is_norm
from lightning_optkit.init._write import is_sharded
from lightning_optkit.init.gain import check_activation
from lightning_optkit.init.initialize import unwrapped

__all__ = ["Initialize"]

# In the order that LightningCLI tries them: the last would accept a mapping as arguments of a tensor.
_Activation: TypeAlias = nn.Module | str | Callable[[Tensor], Any]

_SHARDED_OTHERWISE = ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")

# Values of `InitRow.scheme` for layers that are small on purpose.
_SILENCED = ("zero (", "zero_residual", "depth_scaled")


class Initialize(FitCallback):
    """Draws the parameters by a scheme when a fit starts; prints mean and variance of every layer before and after.

    This happens after `configure_model`, on the final device, before `configure_optimizers` and the first step. A run
    that resumes (`ckpt_path`) or has already trained is not changed, nor is a module that shows signs of training, e.g.
    one loaded for fine-tuning: BatchNorm statistics, a norm with differing weights, or gradients. Loaded weights of a
    module without norms cannot be recognized: use `only` to select what is drawn, or omit this callback. Frozen
    parameters are never drawn.

    Every rank gets the same weights, also for a sharded module (FSDP2 by ModelParallelStrategy; each rank draws the
    full parameter and keeps its shard). A module on the meta device is materialized first. The random numbers come from
    a separate generator, so those of the run do not change. The activations are those of one training batch, run
    through `training_step` without autograd: buffers, modes, metrics and random numbers are restored, dropout is off,
    `self.log` does nothing. A warning names layers that vanish, explode or saturate afterwards.

    Args:
        scheme: A function of `lightning_optkit.init`, a `functools.partial` of one, a custom one, or several in order:
            schemes for one weight (`he`, `xavier`, ...), for a model (`fixup`, `depth_scaled`, `zero_residual`), for a
            model and a batch (`lsuv`), or `partial(mup_width, base=narrow_module)`, which also gives every optimizer of
            the module parameter groups with muP's learning rates, including when resuming.
        activation: See `init.initialize`; for schemes for one weight.
        only: Name of the submodule to initialize, for fine-tuning. Default: the whole module.
        seed: Seed of the draws, in [0, inf). Default: that of torch's generator on rank 0 (`seed_everything`).
        even_if_trained: Also draw if training has begun (but not with `ckpt_path`).
        forward: How to run the module on a batch (as transferred to the device), `forward(module, batch)`. Default:
            `training_step`; required if that steps an optimizer itself (manual optimization).
        verbose: Print the table.

    Raises:
        TypeError: if `scheme` is neither a function nor several.
        ValueError: if nothing can be initialized, the strategy flattens parameters (FSDP1, DeepSpeed), or the scheme
            refuses.

    Cost: at most three forward passes over one batch, once.

    Example:
        >>> from functools import partial
        >>> from lightning_optkit.init import depth_scaled, truncated_normal
        >>> gpt2 = Initialize([partial(truncated_normal, std=0.02), depth_scaled])
        >>> trainer = pl.Trainer(callbacks=[gpt2], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        scheme: Sequence[Callable[..., Any]] | Scheme | Callable[..., Any],
        activation: nn.Module | Mapping[str, _Activation] | str | Callable[[Tensor], Any] | None = None,
        only: str | None = None,
        seed: int | None = None,
        even_if_trained: bool = False,
        forward: Callable[[pl.LightningModule, Any], object] | None = None,
        verbose: bool = True,
    ) -> None:
        self._arguments = {"scheme": scheme}
        self._schemes: list[Any] = list(scheme) if isinstance(scheme, Sequence) else [scheme]
        if not self._schemes or any(isinstance(one, type) or not callable(one) for one in self._schemes):
            raise TypeError(
                f"{type(self).__name__}(scheme={shown(scheme)}): scheme must be a function of "
                "lightning_optkit.init, such as he."
            )
        for given in activation.values() if isinstance(activation, Mapping) else [activation]:
            check_activation(type(self).__name__, given)
        if only is not None:
            check_text(type(self).__name__, "only", only, 'the name of a module, such as "head"')
        if forward is not None:
            check_callable(type(self).__name__, "forward", forward, "forward(module, batch)")
        check_bools(type(self).__name__, even_if_trained=even_if_trained, verbose=verbose)
        if seed is not None:
            check_int(type(self).__name__, "seed", seed, minimum=0)
        self._activation, self._only, self._seed = activation, only, seed
        self._even_if_trained, self._forward, self._verbose = even_if_trained, forward, verbose
        self.rows: list[InitRow] = []
        self.before: list[ActivationRow] = []
        self.after: list[ActivationRow] = []

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy = type(trainer.strategy).__name__
        if strategy in _SHARDED_OTHERWISE:
            raise ValueError(
                f"{type(self).__name__}(...) under {strategy}: it keeps parameters in a form of its own; use "
                "ModelParallelStrategy, or call init.initialize at the end of configure_model."
            )
        refuse_twice(self, trainer)
        if not is_a(trainer.strategy, ModelParallelStrategy):  # this strategy materializes itself, after sharding
            materialize(pl_module, trainer.strategy.root_device)
        original = pl_module.configure_optimizers

        def configure_optimizers() -> Any:
            reason = self._why_not(trainer, pl_module)
            if reason is None:
                self._initialize(trainer, pl_module)
            else:
                rank_zero_info(f"Initialize: nothing drawn, since {reason}.")
            with split_by_multiplier(pl_module, self._multipliers(pl_module)):
                return original()

        self._override(pl_module, "configure_optimizers", configure_optimizers)

    # --- implementation ---

    def _why_not(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
        if Run(trainer).is_resuming:
            return "the run resumes from a checkpoint"
        if self._even_if_trained or self._only is not None:
            return None
        if trainer.global_step > 0:
            return "the trainer has trained already"
        sign = _sign_of_training(pl_module)
        return None if sign is None else f"{sign} (even_if_trained=True draws)"

    def _initialize(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seed = trainer.strategy.broadcast(torch.initial_seed() if self._seed is None else self._seed)
        generator = torch.Generator().manual_seed(seed % 2**63)
        target = pl_module if self._only is None else _submodule(pl_module, self._only)
        needs_batch = any("batch" in _parameters_of(scheme) for scheme in self._schemes)
        run = functools.partial(run_training_step, type(self).__name__, trainer, self._forward)
        self.rows, self.before, self.after = [], [], []
        batch = None
        if needs_batch or self._verbose:
            try:
                batch = _first_batch(trainer, pl_module)
                self.before = _statistics(pl_module, batch, run)
            except (RuntimeError, ValueError) as error:
                if needs_batch:
                    raise
                rank_zero_warn(f"Initialize: without a table of activations. {error}")
                batch = None
        for scheme in self._schemes:
            self.rows += self._apply(scheme, target, generator, pl_module, batch, run)
        _make_alike(pl_module)
        if batch is not None:
            self.after = _statistics(pl_module, batch, run)
            self._report()

    def _apply(
        self,
        scheme: Callable[..., Any],
        target: nn.Module,
        generator: torch.Generator,
        pl_module: pl.LightningModule,
        batch: Any,
        run: Callable[[pl.LightningModule, Any], object],
    ) -> list[InitRow]:
        parameters = _parameters_of(scheme)
        if next(iter(parameters), "") not in ("model", "target"):
            return initialize(target, scheme, activation=self._activation, generator=generator)
        keywords: dict[str, Any] = {"generator": generator} if "generator" in parameters else {}
        if "batch" in parameters:
            keywords |= {"batch": batch, "forward": lambda model, batch: run(pl_module, batch)}
        rows = scheme(target, **keywords)
        return [*rows] if isinstance(rows, list) else []

    def _report(self) -> None:
        if self._verbose:
            table = render_activations(self.before, self.after)
            rank_zero_info(f"Initialize: {self._names()}, activations of one training batch\n{table}")
        bad: dict[str, list[str]] = {}
        meant = {row.module for row in self.rows if row.scheme.startswith(_SILENCED)}
        for row in self.after:
            if row.verdict and not (row.verdict == "dies" and row.layer in meant):
                bad.setdefault(row.verdict, []).append(row.layer or "(model)")
        for verdict, layers in bad.items():
            more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
            rank_zero_warn(
                f"Initialize: after {self._names()} the signal {verdict} in {', '.join(layers[:3])}{more}; standardize "
                "the inputs (Preprocess(Standardize())), or try lsuv, which gives every layer variance 1."
            )

    def _names(self) -> str:
        functions = map(unwrapped, self._schemes)
        return ", ".join(getattr(function, "__name__", type(function).__name__) for function in functions)

    def _multipliers(self, pl_module: pl.LightningModule) -> list[MupRow]:
        """The multipliers of muP, without drawing; the weights of a resumed run already exist."""
        for scheme in self._schemes:
            if unwrapped(scheme) is mup_width:
                target = pl_module if self._only is None else _submodule(pl_module, self._only)
                rows: Any = scheme(target, draw=False)
                return [*rows]
        return []


def _first_batch(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """The same batch on every rank, as `training_step` receives it."""
    batch = TrainingSet("Initialize", trainer, lambda batch: batch).first()
    batch = trainer.strategy.broadcast(batch)
    batch = trainer.precision_plugin.convert_input(batch)
    batch = before_batch_transfer(pl_module, batch)
    return trainer.strategy.batch_to_device(batch)


def _statistics(
    pl_module: pl.LightningModule, batch: Any, run: Callable[[pl.LightningModule, Any], object]
) -> list[ActivationRow]:
    return activation_statistics(pl_module, batch, forward=lambda module, batch: run(pl_module, batch))


@torch.no_grad()
def _make_alike(pl_module: pl.LightningModule) -> None:
    """Gives every rank the weights of rank 0: a scheme that runs the module may differ in its last bits."""
    if dist.is_available() and dist.is_initialized():
        for parameter in pl_module.parameters():
            if not hasattr(parameter, "device_mesh"):
                dist.broadcast(parameter.data, src=0)


def _sign_of_training(pl_module: pl.LightningModule) -> str | None:
    """A sign that the weights are not fresh; all entries of a fresh norm are equal."""
    for name, buffer in pl_module.named_buffers():
        if name.rpartition(".")[2] == "num_batches_tracked" and int(buffer) > 0:
            return f"{name.rpartition('.')[0]!r} holds statistics of an earlier training"
    for name, module in pl_module.named_modules():
        weight: Any = getattr(module, "weight", None) if is_norm(module) else None
        whole: Tensor | None = weight.full_tensor() if is_sharded(weight) else weight
        if whole is not None and bool((whole != whole.flatten()[0]).any()):
            return f"{name!r} is a norm with trained weights"
    if any(parameter.grad is not None for parameter in pl_module.parameters()):
        return "its parameters hold gradients of an earlier training"
    return None


def _submodule(pl_module: pl.LightningModule, name: str) -> nn.Module:
    found: nn.Module | None = dict(pl_module.named_modules()).get(name)
    if found is None:
        raise ValueError(f"Initialize(only={shown(name)}): only must name a submodule of {type(pl_module).__name__}.")
    return found


def _parameters_of(scheme: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(scheme).parameters
