# SPDX-License-Identifier: Apache-2.0
"""What was set for a run, as text: the Trainer, data, module and optimizers, and the arguments of each callback."""

import inspect
import os
import textwrap
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ModelSummary, ProgressBar
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_optkit._checks import shown
from lightning_optkit.callbacks.seams.arguments_text import arguments_text, is_default
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_packages import is_a
from lightning_optkit.callbacks.seams.optimizer_names import optimizer_names
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.callbacks.seams.schedules_of_run import base_rate
from lightning_optkit.step import OnePassOptimizer

__all__ = ["callback_arguments", "run_settings", "strategies_in_force", "watched_metrics"]

_DEFAULT_SEED = 67_280_421_310_721  # torch's, where nobody has set one
_NO_HYPERPARAMETERS = {"params", "initial_lr", "max_lr", "min_lr", "name"}
_LONGEST = 300  # characters of one value


def run_settings(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, str]:
    """Settings by name, in display order; those that are not set are left out."""
    run = Run(trainer)
    epochs = "no limit" if run.max_epochs is None else f"{run.max_epochs:,}"
    planned = run.steps_at_end()
    params = [p for p in pl_module.parameters() if not torch.nn.parameter.is_lazy(p)]
    trained = sum(p.numel() for p in params if p.requires_grad)
    total = sum(p.numel() for p in params)
    facts = {
        "module": type(pl_module).__name__,
        "parameters": f"{total:,}" + ("" if trained == total else f", {trained:,} of them trained"),
        "seed": _seed(),
        "batch size": _batch_size(trainer, run),
        "epochs": epochs + ("" if planned is None else f", {planned:,} steps"),
        "precision": str(trainer.precision),
        "gradient clip of the Trainer": "" if run.clip is None else repr(run.clip),
        "device": f"{trainer.strategy.root_device.type}, {_counted(trainer.world_size, 'process')}",
        "optimization": "" if pl_module.automatic_optimization else "manual",
    }
    names = optimizer_names(trainer)
    for name, optimizer in zip(names, trainer.optimizers, strict=True):
        key = "optimizer" if len(names) == 1 else f"optimizer of {name}"
        facts[key] = _optimizer(optimizer) if isinstance(optimizer, Optimizer) else type(optimizer).__name__
    facts["schedulers"] = ", ".join(_schedulers(trainer))
    hparams: Mapping[str, Any] = getattr(pl_module, "hparams", {})
    facts |= {f"hyperparameter {name}": shown(value)[:_LONGEST] for name, value in hparams.items()}
    return {name: text for name, text in facts.items() if text}


def callback_arguments(trainer: pl.Trainer, but: object) -> dict[str, str]:
    """The arguments of each callback `but` one and private ones, without those at their defaults or not kept."""
    found: dict[str, str] = {}
    for callback in callbacks_of(trainer, object, but=but):
        if is_a(callback, ProgressBar, ModelSummary) or type(callback).__name__.startswith("_"):
            continue
        name, number = type(callback).__name__, 2
        while name in found:
            name, number = f"{type(callback).__name__} {number}", number + 1
        found[name] = arguments_text(callback)
    return found


def strategies_in_force(trainer: pl.Trainer, but: object) -> list[str]:
    """The callbacks of this package `but` one, and the schedulers, in indented lines of at most 80 columns."""
    texts = [repr(each) for each in callbacks_of(trainer, FitCallback, but=but)]
    texts += _schedulers(trainer)
    looks: dict[str, Any] = {"initial_indent": "  ", "subsequent_indent": "    "}
    return [textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False, **looks) for text in texts]


def watched_metrics(trainer: pl.Trainer) -> dict[str, str]:
    """Goal, "min" or "max", of each metric that a checkpoint or an early stop watches."""
    watching: list[Any] = [*callbacks_of(trainer, ModelCheckpoint), *callbacks_of(trainer, EarlyStopping)]
    return {each.monitor: each.mode for each in watching if each.monitor is not None and each.mode in ("min", "max")}


def _schedulers(trainer: pl.Trainer) -> list[str]:
    return [f"{type(config.scheduler).__name__} each {config.interval}" for config in trainer.lr_scheduler_configs]


def _optimizer(optimizer: Optimizer) -> str:
    """Class and hyperparameters of its groups, without those at their defaults."""
    defaults = {name: p.default for name, p in inspect.signature(type(optimizer).__init__).parameters.items()}
    texts = []
    for group in optimizer.param_groups:
        values = {"lr": base_rate(group) if "lr" in group else None} | {
            name: value
            for name, value in group.items()
            if name not in _NO_HYPERPARAMETERS and name in defaults and name != "lr"
        }
        kept = [
            f"{name}={shown(value)}"
            for name, value in values.items()
            if value is not None and (name == "lr" or not is_default(value, defaults[name]))
        ]
        texts.append(f"({', '.join(kept)})")
    parts = list(dict.fromkeys(texts))
    how = ", in one pass" if isinstance(optimizer, OnePassOptimizer) else ""
    more = f" and {len(parts) - 4} more kinds of groups" if len(parts) > 4 else ""
    return f"{type(optimizer).__name__}{', '.join(parts[:4])}{more}{how}"


def _seed() -> str:
    seed = os.environ.get("PL_GLOBAL_SEED")
    if seed is not None:
        return seed
    return "not set" if torch.initial_seed() == _DEFAULT_SEED else f"{torch.initial_seed()}, of torch alone"


def _batch_size(trainer: pl.Trainer, run: Run) -> str:
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        return ""
    accumulated = run.window
    whole = loader.batch_size * accumulated * run.replicas
    if whole == loader.batch_size:
        return f"{whole:,}"
    parts = [
        f"{loader.batch_size:,}",
        *([f"{accumulated} accumulated"] if accumulated > 1 else []),
        *([f"{run.replicas} processes"] if run.replicas > 1 else []),
    ]
    return f"{' x '.join(parts)} = {whole:,}"


def _counted(number: int, unit: str) -> str:
    return f"1 {unit}" if number == 1 else f"{number} {unit}es"
