# SPDX-License-Identifier: Apache-2.0
"""Weights beside those that the module holds, also where processes share them: kept in a checkpoint, and put back.

Two sets lie in the checkpoint of an average: what is exported, and what training goes on from.

Ordinary and full checkpoints hold the second under `current_model_state`, as Lightning's own WeightAveraging does;
parameters that have no average, as the frozen ones beside an adapter, are not written twice. A
sharded checkpoint writes shards only of its `state_dict` and `optimizer_states`, the rest comes from rank 0; there the
second is one more of the optimizer states, so that every rank writes its own part and the `state_dict` stays clean.
"""

from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_optkit.callbacks.seams.lightning_packages import is_a
from lightning_optkit.callbacks.seams.lightning_private import saves_shards
from lightning_optkit.step.shards import distribute_like

__all__ = ["as_saved", "copy_weights", "load_trained", "load_weights", "save_trained"]

_KEY = "current_model_state"
_PLACE = "current_model_state_in_optimizer"


def as_saved(trainer: pl.Trainer, tensor: Tensor) -> Tensor:
    """The tensor as the strategy's `state_dict` has it: a shard, or gathered from all processes."""
    if hasattr(tensor, "full_tensor") and not _is_sharded(trainer):
        whole: Tensor = tensor.full_tensor().cpu()
        return whole
    return tensor.detach()


def save_trained(
    trainer: pl.Trainer, checkpoint: dict[str, Any], trained: dict[str, Tensor], same: Collection[str] = ()
) -> None:
    """Puts the trained weights beside the `state_dict`; call it before the `state_dict` is changed.

    Args:
        trainer: Every process must call.
        checkpoint: As `on_save_checkpoint` is given it.
        trained: Those that the module does not hold at this moment, by name.
        same: Names of those that will stay in the `state_dict` as they are, and are left out where one file holds all.
    """
    left_out = () if is_a(trainer.strategy, ModelParallelStrategy) else same
    weights = {name: value for name, value in checkpoint["state_dict"].items() if name not in left_out}
    for name, tensor in trained.items():
        value = as_saved(trainer, tensor)
        if name in weights:
            weights[name] = value
    if _is_sharded(trainer):
        checkpoint[_PLACE] = len(checkpoint["optimizer_states"])
        checkpoint["optimizer_states"] = [*checkpoint["optimizer_states"], weights]
    else:
        checkpoint[_KEY] = weights


def load_trained(trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Gives the module the trained weights that `save_trained` put there, if any."""
    strict = pl_module.strict_loading
    if not is_a(trainer.strategy, ModelParallelStrategy):
        if _KEY in checkpoint:
            pl_module.load_state_dict({**pl_module.state_dict(), **checkpoint[_KEY]}, strict=strict)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as load_sharded

    if _PLACE in checkpoint:
        weights = get_model_state_dict(pl_module)
        load_sharded({f"optimizer_{checkpoint[_PLACE]}": weights}, checkpoint_id=trainer.ckpt_path)
        set_model_state_dict(pl_module, weights, options=StateDictOptions(strict=strict))
    elif _KEY in checkpoint:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
        set_model_state_dict(pl_module, checkpoint[_KEY], options=options)


def copy_weights(pl_module: pl.LightningModule) -> dict[str, Tensor]:
    """The `state_dict` on CPU, whole also where processes share the weights; then every one of them must call."""
    whole = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in pl_module.state_dict().items()
    }
    return {name: value.detach().to("cpu", copy=True) for name, value in whole.items()}


def load_weights(pl_module: pl.LightningModule, weights: dict[str, Tensor]) -> None:
    """Gives the module what `copy_weights` returned; without communication, for the processes may be parting."""
    here = pl_module.state_dict()
    placed = {name: distribute_like(value, here[name]) if name in here else value for name, value in weights.items()}
    pl_module.load_state_dict(placed, strict=pl_module.strict_loading)


def _is_sharded(trainer: pl.Trainer) -> bool:
    return is_a(trainer.strategy, ModelParallelStrategy) and saves_shards(trainer.strategy)
