# SPDX-License-Identifier: Apache-2.0
"""One batch of a run during which modules, gradients and updates are measured."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_optkit._torch_private import supports_amp_scaling
from lightning_optkit.callbacks.seams.lightning_packages import loss_scaler
from lightning_optkit.callbacks.seams.lightning_private import is_compiled
from lightning_optkit.callbacks.seams.overrides import override, restore
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.callbacks.seams.schedules_of_run import (
    added_decay,
    highest_decay,
    highest_momentum,
    highest_rate,
    rate_to_come,
)
from lightning_optkit.callbacks.seams.watched_method import WatchedMethod
from lightning_optkit.diagnostics._guard import Guarding, unguarded
from lightning_optkit.diagnostics._observations import Check
from lightning_optkit.diagnostics._signals import ProbeSeen
from lightning_optkit.diagnostics.measure.calls import CalledFunctions, CalledLayers
from lightning_optkit.diagnostics.measure.hidden import hidden_parameters
from lightning_optkit.diagnostics.measure.modules import CalledModules
from lightning_optkit.diagnostics.measure.parameters import StepMeasure, parameters_of
from lightning_optkit.diagnostics.measure.rows import EqualRows
from lightning_optkit.step import OnePassOptimizer
from lightning_optkit.step.shards import reshard

__all__ = ["MeasuredStep"]


class MeasuredStep:
    """Created before a batch that ends with a step; `close` must be called after it.

    Hooks would make torch.compile compile anew, so the modules of a compiled module are not watched.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        step: Number of the step.
        former: The measured step before it, its number and norms.
        measures_layers: Whether to measure the scales of layers' outputs, which takes a pass over each.
        guard: What stands around what is done within the batch.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        step: int,
        former: tuple[int, StepMeasure] | None = None,
        measures_layers: bool = True,
        guard: Guarding = unguarded,
    ) -> None:
        self._trainer, self._step, self._rate, self._decay = trainer, step, float("nan"), 0.0
        self._to_come, self._added, self._is_in_gradient, self._guard = 0.0, 0.0, False, guard
        self._momentum = 0.0
        self.is_taken = False  # whether an optimizer has stepped
        reshard(pl_module)  # what a validation has left whole is freed by the backward pass
        named = dict(pl_module.named_parameters())
        self._params: dict[str, Tensor] = {name: p for name, p in named.items() if not is_lazy(p)}
        optimizers = Run(trainer).optimizers
        own, optimized = set(named.values()), {p for each in optimizers for p in parameters_of(each)}
        self._strays = len(optimized - own)
        self._named_modules = dict(pl_module.named_modules())  # once: to walk a large module takes as long as to look
        hidden = hidden_parameters(self._named_modules, own)
        self._hidden = {name: p for name, p in hidden.items() if p not in optimized}
        self._former = former[1] if former is not None and former[0] == step - 1 else None
        self._is_watched = not is_compiled(pl_module)
        self._modules: CalledModules | None = None
        self._layers: CalledLayers | None = None
        self._functions: CalledFunctions | None = None
        self._module, self._training_step = pl_module, WatchedMethod(pl_module, "training_step", self._watching)
        self.norms = StepMeasure(self._params, optimizers)
        try:
            self._begin(measures_layers)
        except Exception:
            self.close()
            raise

    def _begin(self, measures_layers: bool) -> None:
        """Watches the module, if that is possible."""
        if not self._is_watched:
            self.norms.begin()
            return
        self._modules = CalledModules(self._named_modules, self._guard)
        self._layers = CalledLayers(self._named_modules, measures_layers, self._guard)
        self._functions = CalledFunctions(self._layers.inside, self._guard)
        # What hooks of the module do to the weights before is then done.
        override(self._module, "training_step", self._training_step)

    def after_step(self, optimizer: Optimizer) -> None:
        """Measures a step of an optimizer."""
        self.is_taken = True
        scaler: Any = loss_scaler(self._trainer)
        is_scaled = scaler is not None and supports_amp_scaling(optimizer)
        self.norms.after(optimizer, float(scaler.get_scale()) if is_scaled else 1.0)
        self._decay = max(self._decay, highest_decay(optimizer))
        self._added = max(self._added, added_decay(optimizer))
        self._momentum = max(self._momentum, highest_momentum(optimizer))
        self._is_in_gradient |= isinstance(optimizer, OnePassOptimizer)
        self._to_come = max(self._to_come, rate_to_come(optimizer))
        self._rate = max(self._rate, highest_rate(optimizer)) if self._rate == self._rate else highest_rate(optimizer)

    @property
    def called(self) -> set[str]:
        """Names of the modules that were called."""
        return set() if self._modules is None else set(self._modules.calls)

    @property
    def without_grad(self) -> set[str]:
        """Names of those that were called under `torch.no_grad()`."""
        return set() if self._modules is None else self._modules.without_grad

    def check(
        self, rows: EqualRows, alive: dict[tuple[str, int], list[Tensor]], probe: ProbeSeen | None = None
    ) -> Check:
        """What was measured; to be asked before gradients are cleared.

        Args:
            rows: Weights that started with equal rows.
            alive: Units that were active in former checks; updated.
            probe: The losses along the update.
        """
        check = Check(
            self._step, self._rate, self.norms.seen(), rows.seen(self._params),
            probe=probe, strays=self._strays, decay=self._decay, added=self._added,
            is_in_gradient=self._is_in_gradient, rate_to_come=self._to_come,
            momentum=self._momentum,
            hidden=tuple(name for name, p in self._hidden.items() if p.grad is not None),
            is_undone=self._former is not None and self.norms.is_undone(self._former),
        )  # fmt: skip
        if self._modules is None or self._layers is None or self._functions is None:
            return check
        return replace(
            check,
            modules=tuple(self._modules.calls.values()),
            activations=self._functions.seen(alive),
            layers=self._layers.layers(),
            first_input=self._layers.first_input(),
            losses=tuple(self._functions.losses),
        )

    @property
    def rate(self) -> float:
        """The highest learning rate of the step."""
        return self._rate

    def end_of_forward(self) -> None:
        """Stops watching calls, so that what follows may run modules again."""
        if self._modules is not None:
            self._modules.close()
        if self._layers is not None:
            self._layers.close()
        restore(self._module, "training_step", self._training_step)

    def _watching(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._guard("the copy of weights before a step"):
            self.norms.begin()
        if self._functions is None:
            return original(*args, **kwargs)
        with self._functions:
            return original(*args, **kwargs)

    def close(self) -> None:
        """Removes hooks; no-op the second time."""
        self.norms.close()
        self.end_of_forward()
