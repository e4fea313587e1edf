# SPDX-License-Identifier: Apache-2.0
"""Saves and restores a second set of weights in a checkpoint, also when they are sharded.

The checkpoint of an average has two sets: the exported weights, and those from which training continues.

Ordinary and full checkpoints store the second under `current_model_state`, like Lightning's own WeightAveraging;
parameters without an average, e.g. frozen ones in an adapter run, are not stored twice. A sharded checkpoint shards
only its `state_dict` and `optimizer_states`, and takes the rest from rank 0; there the second set is stored as another
optimizer state, so that every rank writes its own part and the `state_dict` is unaffected.
"""

from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_optkit.callbacks.seams.lightning_packages import is_a
from lightning_optkit.callbacks.seams.lightning_private import saves_shards
from lightning_optkit.diagnostics.measure.parameters import plain_name
from lightning_optkit.step.shards import distribute_like

__all__ = [
    "as_saved",
    "copy_weights",
    "forget_trained",
    "holds_trained",
    "in_one_file",
    "load_trained",
    "load_weights",
    "save_trained",
]

_KEY = "current_model_state"
_PLACE = "current_model_state_in_optimizer"


def as_saved(trainer: pl.Trainer, tensor: Tensor) -> Tensor:
    """The tensor as in the strategy's `state_dict`: a shard, or gathered from all processes."""
    if hasattr(tensor, "full_tensor") and not _is_sharded(trainer):
        whole: Tensor = tensor.full_tensor().cpu()
        return whole
    return tensor.detach()


def save_trained(
    trainer: pl.Trainer, checkpoint: dict[str, Any], trained: dict[str, Tensor], same: Collection[str] = ()
) -> None:
    """Adds the trained weights to a checkpoint; must be called before the `state_dict` is changed.

    Args:
        trainer: The Trainer; every process must call this.
        checkpoint: The argument of `on_save_checkpoint`.
        trained: Trained weights that the module does not currently hold, by name.
        same: Names of weights that stay unchanged in the `state_dict`; omitted if one file contains everything.
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


def holds_trained(checkpoint: dict[str, Any]) -> bool:
    """Whether `save_trained` added weights to it."""
    return _KEY in checkpoint or _PLACE in checkpoint


def forget_trained(checkpoint: dict[str, Any]) -> None:
    """Removes what says that it has them."""
    checkpoint.pop(_KEY, None)
    checkpoint.pop(_PLACE, None)


def in_one_file(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A sharded checkpoint, gathered, with the weights where a full one has them."""
    if _PLACE not in checkpoint:
        return checkpoint
    place, states = checkpoint[_PLACE], checkpoint["optimizer_states"]
    others = {key: value for key, value in checkpoint.items() if key != _PLACE}
    return {**others, _KEY: states[place], "optimizer_states": states[:place] + states[place + 1 :]}


def load_trained(trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Loads the weights of `save_trained` into the module, if there are any."""
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
        _load_from_file(pl_module, checkpoint[_KEY])


def _load_from_file(pl_module: pl.LightningModule, weights: dict[str, Tensor]) -> None:
    """Loads the weights of a full file into shards.

    Those that the file has only once, since they have no average, came with its `state_dict`, in which none was
    missing; torch would miss them here.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    known = {plain_name(name) for name in pl_module.state_dict()}
    unknown = sorted(name for name in weights if plain_name(name) not in known)
    if unknown and pl_module.strict_loading:
        raise RuntimeError(
            f"{type(pl_module).__name__}: {_KEY} of the checkpoint has {unknown[0]!r}, and the module has not; resume "
            "with the layers of the run that saved it."
        )
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(pl_module, {**weights}, options=options)  # torch puts shards into the dict


def copy_weights(pl_module: pl.LightningModule) -> dict[str, Tensor]:
    """The full `state_dict` on CPU; with sharded weights every process must call this."""
    whole = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in pl_module.state_dict().items()
    }
    return {name: value.detach().to("cpu", copy=True) for name, value in whole.items()}


def load_weights(owner: str, pl_module: pl.LightningModule, weights: dict[str, Tensor]) -> None:
    """Loads the result of `copy_weights`; without communication, since processes may be about to exit.

    Raises:
        RuntimeError: if the entries of its `state_dict` have changed since, other than by pruning.
    """
    here = pl_module.state_dict()
    weights = _pruned_like(here, weights)
    changed = sorted(weights.keys() ^ here.keys())
    if changed and pl_module.strict_loading:
        raise RuntimeError(
            f"{owner}: {type(pl_module).__name__} has other entries in its state_dict than when it was validated, such "
            f"as {changed[0]!r}, so its best weights cannot be restored; leave its layers alone in training, or give "
            "restore_best=False."
        )
    placed = {name: distribute_like(value, here[name]) if name in here else value for name, value in weights.items()}
    pl_module.load_state_dict(placed, strict=pl_module.strict_loading)


def _pruned_like(here: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, with the masks of `torch.nn.utils.prune` where `here` has them and multiplied out elsewhere."""
    result = dict(weights)
    for name in {*here, *weights}:
        base, _, kind = name.rpartition("_")
        original, mask = f"{base}_orig", f"{base}_mask"
        if kind != "mask":
            continue
        if base in here and original in weights and mask in weights:
            result[base] = result.pop(original) * result.pop(mask)
        elif base in weights and original in here and mask in here:
            result[original], result[mask] = result.pop(base), here[mask].new_ones(here[mask].shape)
    return result


def _is_sharded(trainer: pl.Trainer) -> bool:
    return is_a(trainer.strategy, ModelParallelStrategy) and saves_shards(trainer.strategy)
