# SPDX-License-Identifier: Apache-2.0
"""Saves the names of the parameters with the states of the optimizers, and loads the states by them.

torch numbers the parameters in the order of the groups, and gives the state of a number to whatever has it when it
loads. Lightning's FSDP2 strategy takes the numbers of a file saved by one process or DDP for places in
`module.parameters()`. So the numbers saved here are those places, and beside them stand the names, by which
`matched_states.py` fits states to the groups of the run that loads them. torch and Lightning alone load the files too:
they only compare numbers within a file.
"""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.gathered_shards import gathered_shards, is_sharded
from lightning_optkit.callbacks.seams.lightning_packages import is_a, twins
from lightning_optkit.callbacks.seams.lightning_private import saves_shards
from lightning_optkit.callbacks.seams.matched_states import CLASSES, NAMES, aliases_of, classes_of, match_states
from lightning_optkit.callbacks.seams.nameless import SHAPES
from lightning_optkit.callbacks.seams.other_weights import with_advice
from lightning_optkit.callbacks.seams.overrides import override_once
from lightning_optkit.callbacks.seams.sharded_states import (
    check_named,
    load_optimizers,
    saved_outlines,
    with_wide_integers,
    without_empty_step,
)
from lightning_optkit.callbacks.seams.usable_checkpoints import check_file, check_of_lightning
from lightning_optkit.callbacks.seams.whole_checkpoints import NO_CHECKPOINT

__all__ = ["number_by_module"]


@runtime_checkable
class KnowsBefore(Protocol):
    """A callback that acts before FSDP2 loads states of optimizers: earlier than `on_load_checkpoint`."""

    def before_states(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Called in every process, with weights loaded."""
        ...


def number_by_module(trainer: pl.Trainer) -> None:
    """Overrides how the strategy of a run saves and loads its optimizers; FSDP1 and DeepSpeed are left alone.

    The overrides stay with the strategy: checkpoints are also written on an exception and after a fit.
    """
    strategy = trainer.strategy
    if is_a(strategy, ModelParallelStrategy):
        override_once(strategy, "load_checkpoint", _load_shards)
    elif is_a(strategy, SingleDeviceStrategy, DDPStrategy):
        override_once(strategy, "load_optimizer_state_dict", _load_optimizers)
        override_once(strategy, "load_checkpoint", _load_whole)
        override_once(strategy, "load_model_state_dict", _load_weights)
    else:
        return
    override_once(strategy, "optimizer_state", _numbered)


def _module(strategy: Strategy) -> pl.LightningModule:
    assert strategy.lightning_module is not None
    return strategy.lightning_module


# --- saving ---


def _numbered(strategy: Strategy, original: Callable[[Optimizer], Any], optimizer: Optimizer) -> Any:
    """Lightning's saved state of an optimizer, with other numbers and with names."""
    if is_a(strategy, ModelParallelStrategy):
        with without_empty_step(optimizer):
            saved = with_wide_integers(original, optimizer) if _gathers(strategy) else original(optimizer)
    else:
        saved = original(optimizer)
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(saved, dict) or not groups or "param_groups" not in saved:
        return saved
    places: dict[Tensor, int] = {param: place for place, param in enumerate(_module(strategy).parameters())}
    kept = {param: None for group in groups for param in group["params"]}
    nameless = [param for param in kept if param not in places]
    places |= {param: len(places) + index for index, param in enumerate(nameless)}  # behind those of the module
    if is_a(strategy, ModelParallelStrategy):  # by place already; or, in a sharded checkpoint, by name
        if any(isinstance(number, str) for number in chain.from_iterable(g["params"] for g in saved["param_groups"])):
            return {**saved, CLASSES: classes_of(optimizer)}
        numbers = {place: place for param, place in places.items() if param in kept}
    else:
        pairs = zip(saved["param_groups"], groups, strict=False)
        numbers = {n: places[p] for held, group in pairs for n, p in zip(held["params"], group["params"], strict=False)}
    names = {places[param]: aliases[0] for param, aliases in aliases_of(_module(strategy)).items()}
    return {
        **saved,
        "state": {numbers.get(number, number): state for number, state in saved["state"].items()},
        "param_groups": [{**g, "params": [numbers[number] for number in g["params"]]} for g in saved["param_groups"]],
        NAMES: {place: names[place] for place in sorted(numbers.values()) if place in names},
        **({SHAPES: {places[param]: tuple(param.shape) for param in nameless}} if nameless else {}),
        CLASSES: classes_of(optimizer),
    }


def _gathers(strategy: Strategy) -> bool:
    return is_a(strategy, ModelParallelStrategy) and not saves_shards(strategy)


# --- loading ---


def _load_optimizers(strategy: Strategy, load: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any]) -> None:
    """Loads the states into one process, or under DDP."""
    schedulers = [config.scheduler for config in strategy.lr_scheduler_configs]
    saved = checkpoint["optimizer_states"], checkpoint.get("lr_schedulers", [])
    matched = match_states(_module(strategy), strategy.optimizers, schedulers, *saved)
    load({**checkpoint, "optimizer_states": matched.optimizers})
    if "lr_schedulers" in checkpoint:  # Lightning restores them next, from the same dict
        checkpoint["lr_schedulers"] = matched.schedulers


def _load_whole(
    strategy: Strategy,
    load: Callable[..., dict[str, Any]],
    checkpoint_path: str | Path,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Loads a checkpoint into one process, or under DDP, also that of a sharded strategy."""
    path = Path(checkpoint_path)
    if type(strategy.checkpoint_io) in twins(TorchCheckpointIO) and path.is_dir():
        if not is_sharded(path):
            raise IsADirectoryError(f"ckpt_path={str(path)!r}: {NO_CHECKPOINT}")
        return gathered_shards(path, weights_only)
    loaded = load(checkpoint_path, weights_only=weights_only)
    check_of_lightning(strategy, path, loaded)
    return loaded


def _load_weights(
    strategy: Strategy, load: Callable[..., None], checkpoint: dict[str, Any], strict: bool = True
) -> None:
    """Adds the next step to torch's error, which names the parameters."""
    try:
        load(checkpoint, strict=strict)
    except RuntimeError as error:
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise
        raise RuntimeError(with_advice(str(error), type(_module(strategy)).__name__)) from error


def _load_shards(
    strategy: Any, load: Callable[..., dict[str, Any]], checkpoint_path: str | Path, weights_only: bool | None = None
) -> dict[str, Any]:
    """Loads a checkpoint under FSDP2, which restores weights and optimizers at once."""
    path, module = Path(strategy.broadcast(checkpoint_path)), _module(strategy)
    if not path.is_file() and not is_sharded(path):
        return load(checkpoint_path, weights_only=weights_only)  # says so
    check_file(strategy, path, weights_only)
    outlines, saved_schedulers = saved_outlines(path, weights_only)
    schedulers = [config.scheduler for config in strategy.lr_scheduler_configs]
    matched = match_states(module, strategy.optimizers, schedulers, outlines, saved_schedulers)
    if not matched.is_known:
        _check_order(strategy, path, outlines)
        if all(isinstance(each, dict) and each.get("state") for each in outlines):
            return load(checkpoint_path, weights_only=weights_only)
        # Before the first step, or of SGD without momentum: Lightning fails where there is nothing to load.
    else:
        check_named(module, strategy.optimizers, matched.optimizers)
    optimizers, strategy.optimizers = strategy.optimizers, []  # Lightning would take groups by their places
    try:
        checkpoint = load(checkpoint_path, weights_only=weights_only)
    finally:
        strategy.optimizers = optimizers
    for callback in callbacks_of(module.trainer, object):
        if isinstance(callback, KnowsBefore):
            callback.before_states(module.trainer, checkpoint)
    if len(matched.optimizers) == len(optimizers):
        load_optimizers(module, optimizers, path, matched.optimizers)
    if "lr_schedulers" in checkpoint:
        checkpoint["lr_schedulers"] = matched.schedulers
    return checkpoint


def _check_order(strategy: Strategy, path: Path, outlines: list[Any]) -> None:
    """Refuses a file whose numbers are those of groups in another order than the module's."""
    places = {param: place for place, param in enumerate(_module(strategy).parameters())}
    for saved, optimizer in zip(outlines, strategy.optimizers, strict=False):
        groups = saved.get("param_groups", []) if isinstance(saved, dict) else []
        numbers = [*chain.from_iterable(group["params"] for group in groups)]
        order = [places.get(param, -1) for group in optimizer.param_groups for param in group["params"]]
        if len(groups) > 1 and numbers == [*range(len(numbers))] and order != sorted(order):
            raise RuntimeError(
                f"{type(optimizer).__name__}: {path} does not say which state is of which parameter, since "
                "it was saved without callbacks of lightning_optkit; resume it once with the strategy that saved it "
                "and ExactResume(), Fuse() or ParameterGroups(), and save it again."
            )
