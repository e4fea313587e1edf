# SPDX-License-Identifier: Apache-2.0
"""Runs `training_step` before training without side effects, and materializes modules on the meta device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torchmetrics import Metric

from lightning_optkit._checks import shown
from lightning_optkit._torch_private import own_buffers, own_parameters, private_reset
from lightning_optkit.callbacks.seams.lightning_packages import is_a
from lightning_optkit.callbacks.seams.module_state import Attributes
from lightning_optkit.callbacks.seams.overrides import override, restore

__all__ = ["materialize", "run_training_step", "without_trace"]


def run_training_step(
    owner: str,
    trainer: pl.Trainer,
    forward: Callable[[pl.LightningModule, Any], object] | None,
    pl_module: pl.LightningModule,
    batch: Any,
) -> None:
    """Runs `forward(pl_module, batch)`, by default `training_step`, in the Trainer's precision; logs nothing.

    The caller must restore modes, buffers and random numbers (`init.activation_statistics` does).

    Raises:
        RuntimeError: if it fails; the message says what to do.
    """
    try:
        with without_trace(pl_module), trainer.precision_plugin.train_step_context():
            if forward is not None:
                forward(pl_module, batch)
            elif not pl_module.automatic_optimization:
                raise RuntimeError("it steps an optimizer by itself")
            elif is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2):
                pl_module.training_step(batch, 0)
            else:
                pl_module.training_step(batch)
    except ValueError:
        raise  # raised by a scheme
    except Exception as error:
        what = "training_step" if forward is None else "forward"
        raise RuntimeError(
            f"{owner}(forward={shown(forward)}): {what} could not be run on a batch before training ({error}); pass "
            "forward=lambda module, batch: ..., which runs the network alone."
        ) from error


@contextmanager
def without_trace(pl_module: pl.LightningModule) -> Iterator[None]:
    """Restores the attributes of the module and of those in it, except the states of metrics; nothing is logged."""
    attributes = Attributes(pl_module)
    metrics = [m for m in pl_module.modules() if isinstance(m, Metric) and not m.update_called]
    muted = [module for module in pl_module.modules() if is_a(module, pl.LightningModule)]
    silences = [(module, name, partial(_log_nothing)) for module in muted for name in ("log", "log_dict")]
    for module, name, silence in silences:
        override(module, name, silence)
    try:
        yield
    finally:
        for module, name, silence in silences:
            restore(module, name, silence)
        attributes.restore()
        for metric in metrics:
            metric.reset()


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    pass


def materialize(model: nn.Module, device: torch.device) -> None:
    """Moves meta tensors to `device`, and initializes them with each module's `reset_parameters`.

    Tied parameters stay tied. torch's random state is restored.

    Raises:
        ValueError: if such a module has no `reset_parameters`, since nothing would initialize it.
    """
    made: dict[int, Any] = {}
    touched = []
    for name, module in model.named_modules():
        stores: tuple[dict[str, Any], ...] = (own_parameters(module), own_buffers(module))
        on_meta = [(store, key) for store in stores for key, t in store.items() if t is not None and t.is_meta]
        if not on_meta:
            continue
        reset = getattr(module, "reset_parameters", None) or private_reset(module)
        if reset is None:
            raise ValueError(
                f"Initialize(...): {name or 'the module'!r} ({type(module).__name__}) is on the meta device and has no "
                "reset_parameters() to fill it; define one, or build it on a device."
            )
        touched.append(reset)
        for store, key in on_meta:
            old = store[key]
            if id(old) not in made:
                new = torch.empty_like(old, device=device)
                made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            store[key] = made[id(old)]
    if touched:
        with isolate_rng():
            for reset in touched:
                reset()
