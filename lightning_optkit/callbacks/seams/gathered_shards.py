# SPDX-License-Identifier: Apache-2.0
"""A sharded folder of FSDP2 as the content of a full checkpoint, for one process and DDP.

Like Lightning under FSDP2, it reads the parts by torch.distributed.checkpoint, which unpickles them.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from lightning_optkit.callbacks.seams.checkpointed_weights import in_one_file
from lightning_optkit.callbacks.seams.matched_states import CLASSES, NAMES
from lightning_optkit.callbacks.seams.whole_checkpoints import SHARED_STATE

__all__ = ["gathered_shards", "is_sharded", "read_alone"]


def is_sharded(path: Path) -> bool:
    """Whether it is the folder of a sharded checkpoint."""
    return (path / SHARED_STATE).is_file()


def read_alone(entries: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Reads these entries of a folder's metadata, whole, without the other processes."""
    parts: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
        for key, entry in entries.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        load_shards(parts, checkpoint_id=path, no_dist=True)
    return parts


def gathered_shards(path: Path, weights_only: bool | None = None) -> dict[str, Any]:
    """The content of the checkpoint, whole, on the CPU."""
    metadata = FileSystemReader(path).read_metadata()
    flat = read_alone(metadata.state_dict_metadata, path)
    parts: dict[str, Any] = {}
    for key, (*places, name) in (metadata.planner_data or {}).items():
        holder = parts
        for place in places:
            holder = holder.setdefault(place, {})
        holder[name] = flat[key]
    shared = torch.load(path / SHARED_STATE, map_location="cpu", weights_only=weights_only)
    owners = sorted((key for key in parts if key.startswith("optimizer_")), key=lambda key: int(key.split("_")[1]))
    states = [_numbered(parts[owner]) for owner in owners]
    return in_one_file({**shared, "state_dict": parts["state_dict"], "optimizer_states": states})


def _numbered(state: dict[Any, Any]) -> dict[Any, Any]:
    """The state of an optimizer by number, as a full checkpoint has it; other weights are left as they are."""
    if "param_groups" not in state:
        return state
    groups = [state["param_groups"][place] for place in sorted(state["param_groups"])]
    names = dict(enumerate(name for group in groups for name in group["params"]))
    numbers = {name: number for number, name in names.items()}
    return {
        "state": {numbers[name]: entries for name, entries in state.get("state", {}).items()},
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
        NAMES: names,
        **({CLASSES: state[CLASSES]} if CLASSES in state else {}),
    }
