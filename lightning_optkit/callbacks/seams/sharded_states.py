# SPDX-License-Identifier: Apache-2.0
"""The optimizer states of a checkpoint under FSDP2: their outline, which is read first, and the states by name.

A sharded folder has the states by name; a full file by number, with the names beside them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.optim import Optimizer

from lightning_optkit.callbacks.seams.gathered_shards import read_alone
from lightning_optkit.callbacks.seams.matched_states import CLASSES, NAMES, aliases_of
from lightning_optkit.callbacks.seams.whole_checkpoints import SHARED_STATE
from lightning_optkit.step import OnePassOptimizer

__all__ = ["check_named", "load_optimizers", "saved_outlines", "with_wide_integers", "without_empty_step"]

_STATE, _GROUPS = "state", "param_groups"


def saved_outlines(path: Path, weights_only: bool | None = None) -> tuple[list[Any], list[Any]]:
    """The optimizer states, of a folder without the tensors, and the states of the schedulers."""
    if not path.is_dir():
        saved = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        return saved.get("optimizer_states", []), saved.get("lr_schedulers", [])
    shared = torch.load(path / SHARED_STATE, map_location="cpu", weights_only=weights_only)
    return _outlines(path), shared.get("lr_schedulers", [])


def _outlines(path: Path) -> list[dict[str, Any]]:
    metadata = FileSystemReader(path).read_metadata()
    kept = {
        key: place
        for key, place in (metadata.planner_data or {}).items()
        if str(place[0]).startswith("optimizer_") and len(place) > 3 and place[1] in (_STATE, _GROUPS)
    }
    classes = {
        key: place[0] for key, place in (metadata.planner_data or {}).items() if len(place) == 2 and place[1] == CLASSES
    }
    read = [*classes, *(key for key, place in kept.items() if place[1] == _GROUPS)]
    groups = read_alone({key: metadata.state_dict_metadata[key] for key in read}, path)
    outlines: dict[str, dict[str, Any]] = {}
    is_flat = all(len(place) == 4 for place in kept.values() if place[1] == _GROUPS)  # no tensors within a setting
    for key, (owner, part, holder, name, *_) in kept.items():
        outline = outlines.setdefault(owner, {_STATE: {}, _GROUPS: {}})
        outline[part].setdefault(holder, {})[name] = groups.get(key)
    for key, owner in classes.items():
        if owner in outlines:  # not the weights that an average keeps at the place of an optimizer
            outlines[owner][CLASSES] = groups[key]
    ordered = [outlines[f"optimizer_{place}"] for place in range(len(outlines))]
    for outline in ordered:
        outline[_GROUPS] = [outline[_GROUPS][place] for place in sorted(outline[_GROUPS])]
        if is_flat:
            outline[NAMES] = {name: name for group in outline[_GROUPS] for name in group["params"]}
    return ordered


def check_named(
    module: pl.LightningModule, optimizers: Sequence[Optimizer], matched: Sequence[Mapping[str, Any]]
) -> None:
    """Raises ValueError if a state belongs to an optimizer that has parameters without a name, before one is loaded."""
    named = {*module.parameters()}
    for optimizer, given in zip(optimizers, matched, strict=True):
        if given[_STATE] and any(param not in named for group in optimizer.param_groups for param in group["params"]):
            raise ValueError(
                f"{type(optimizer).__name__}: it has parameters that are not the module's, whose state FSDP2 cannot "
                "load; register them in the module."
            )


def load_optimizers(
    module: pl.LightningModule, optimizers: Sequence[Optimizer], path: Path, matched: Sequence[Mapping[str, Any]]
) -> None:
    """Loads matched states; every process calls it.

    Args:
        module: The module, with sharded parameters.
        optimizers: Its optimizers.
        path: The checkpoint.
        matched: A state dict, or for a folder its outline, in the order of the groups of each optimizer.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    # Not strict: the names were compared before, and what has had no gradient yet, as within a frozen layer, has none.
    names = {param: aliases[0] for param, aliases in aliases_of(module).items()}
    for place, (optimizer, given) in enumerate(zip(optimizers, matched, strict=True)):
        values = [value for entries in given[_STATE].values() for value in entries.values()]
        if not values or not (path.is_dir() or any(isinstance(value, torch.Tensor) and value.ndim for value in values)):
            # Nothing to distribute: of SGD without momentum, or before the first step. torch fails, or steps first.
            optimizer.load_state_dict({_STATE: dict(given[_STATE]), _GROUPS: given[_GROUPS]})
            continue
        own = [[names[param] for param in group["params"]] for group in optimizer.param_groups]
        groups = [{**group, "params": each} for group, each in zip(given[_GROUPS], own, strict=True)]
        if path.is_dir():
            options = StateDictOptions(cpu_offload=True, strict=False)
            whole: Any = get_optimizer_state_dict(module, optimizer)[_STATE]
            state: Any = {name: _known(whole[name], given[_STATE][name]) for name in whole if name in given[_STATE]}
            _make_room(state, optimizer, given[_STATE], f"optimizer_{place}.{_STATE}", path)
            load_shards({f"optimizer_{place}": {_STATE: state}}, checkpoint_id=path)
        else:
            options = StateDictOptions(broadcast_from_rank0=True, full_state_dict=True, strict=False)
            numbers = [number for group in given[_GROUPS] for number in group["params"]]
            name_of = dict(zip(numbers, [name for each in own for name in each], strict=True))
            state = {name_of[n]: _widened(entries) for n, entries in given[_STATE].items() if n in name_of}
        # Before the other hooks, which take what is there for the checkpoint's.
        hook = optimizer.register_load_state_dict_pre_hook(partial(_leave_known, state), prepend=True)
        try:
            set_optimizer_state_dict(module, optimizer, {_STATE: state, _GROUPS: groups}, options=options)
        finally:
            hook.remove()


def _make_room(
    state: dict[str, dict[str, Any]], optimizer: Optimizer, saved: Mapping[str, Any], prefix: str, path: Path
) -> None:
    """Adds the entries that an optimizer has at times alone, as Schedule-Free has y while its parameters hold x."""
    carried = optimizer._carried if isinstance(optimizer, OnePassOptimizer) else ()
    missing = [(name, key) for name in state for key in carried if key in saved[name] and key not in state[name]]
    parts = FileSystemReader(path).read_metadata().state_dict_metadata if missing else {}
    for name, key in missing:
        part = parts[f"{prefix}.{name}.{key}"]
        assert isinstance(part, TensorStorageMetadata)
        like = next((t for t in state[name].values() if isinstance(t, torch.Tensor) and t.shape == part.size), None)
        if like is not None:
            state[name][key] = like.to(part.properties.dtype, copy=True)


@contextmanager
def without_empty_step(optimizer: Optimizer) -> Iterator[None]:
    """Within it, torch reads the state of an optimizer that has taken no step as it is: there is none.

    It would take a step with gradients of zero first, which is then in the checkpoint, and in the run that goes on: a
    count of 1, decayed moments, and the first value of an average. It takes none where there is a gradient.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    first = next((param for param in params if param.requires_grad), None)
    if optimizer.state or first is None or any(param.grad is not None for param in params):
        yield
        return
    first.grad = torch.zeros_like(first)
    try:
        yield
    finally:
        first.grad = None


def with_wide_integers(get_state: Callable[[Optimizer], Any], optimizer: Optimizer) -> Any:
    """The state that `get_state` gathers, where no collective takes int16, the low-order parts of split weights."""
    widened: set[str] = set()

    def widen(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        states = {param: _widened(entries, widened) for param, entries in state_dict[_STATE].items()}
        return {**state_dict, _STATE: states}

    hook = optimizer.register_state_dict_post_hook(widen)
    try:
        saved = get_state(optimizer)
    finally:
        hook.remove()
    for entries in saved.get(_STATE, {}).values():
        entries.update({name: entries[name].to(torch.int16) for name in widened & entries.keys()})
    return saved


def _widened(entries: Mapping[str, Any], widened: set[str] | None = None) -> dict[str, Any]:
    """The entries of a parameter, with int32 for int16; `widened` receives their names."""
    names = {name for name, value in entries.items() if isinstance(value, torch.Tensor) and value.dtype == torch.int16}
    if widened is not None:
        widened |= names
    return {name: value.to(torch.int32) if name in names else value for name, value in entries.items()}


def _leave_known(saved: Mapping[str, Any], _: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Without what torch's own step, before it loads, has created, and what the checkpoint lacks."""
    states = {name: _known(each, saved[name]) for name, each in state_dict[_STATE].items() if name in saved}
    return {**state_dict, _STATE: states}


def _known(entries: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that the checkpoint has: the others, such as those of a new average, begin as in a fresh run."""
    return {key: value for key, value in entries.items() if key in saved}
