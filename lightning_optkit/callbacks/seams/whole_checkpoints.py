# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint (a file or a folder) is whole, and which one is taken if not; the same on every process."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_optkit.callbacks.seams.sealed_files import checksum_of, damage_of_file, read_seal
from lightning_optkit.callbacks.seams.staged_paths import staged_paths_of, sweep, target_of
from lightning_optkit.callbacks.seams.usable_checkpoints import SHARED_STATE, Needs, use_of

__all__ = ["CHECKSUMS", "NO_CHECKPOINT", "SHARED_STATE", "damage_of", "saved_at", "sweep_orphans", "whole_checkpoint"]

T = TypeVar("T")

NO_CHECKPOINT = 'it is a folder, and none of a sharded checkpoint; give a checkpoint in it, or "last".'
_LIST_OF_TORCH = ".metadata"  # which shard is in which file
CHECKSUMS = "checksums.txt"  # in a folder: the length and checksum of every part, sealed


def whole_checkpoint(
    path: Path, falls_back: bool, needs: Needs | None = None, weights_only: bool | None = None
) -> Path:
    """`path`, or if it is damaged the newest whole checkpoint beside it that is of use. Every process calls it.

    Args:
        path: The checkpoint.
        falls_back: Whether another may be taken.
        needs: What is loaded from it, if known. Weights with other names are taken only if there are no others.
        weights_only: As for `torch.load`.

    Raises:
        FileNotFoundError: if there is no `path`, nor an unfinished save of it.
        IsADirectoryError: if it is a folder with nothing of a sharded checkpoint in it.
        RuntimeError: if it is damaged, and no other is whole or `falls_back` is False.
    """
    damage = _said(damage_of(path, *_share()))
    if not damage:
        return path
    unfinished = _of_first([candidate for candidate in staged_paths_of(path) if candidate.is_dir()])
    if not _of_first(path.exists()) and not unfinished:
        raise FileNotFoundError(
            f"Checkpoint file not found: {path}; give the path of a checkpoint, or none to begin anew."
        )
    if _of_first(path.is_dir() and not any((path / name).exists() for name in (SHARED_STATE, CHECKSUMS, ".metadata"))):
        raise IsADirectoryError(f"ckpt_path={str(path)!r}: {NO_CHECKPOINT}")
    others = _of_first([*_newest_first(unfinished), *_newest_first(_beside(path))])
    found = _most_useful(others, needs, weights_only)
    said = f"SafeCheckpointIO: {path} is damaged ({damage})"
    if found is None:
        kind = " and that this run can use" if needs is not None and others else ""
        raise RuntimeError(
            f"{said} and no whole checkpoint that SafeCheckpointIO saved{kind} is beside it: restore a copy, give "
            "another ckpt_path, or none to begin anew."
        )
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(_of_first(saved_at(found)) / 1e9))
    what = f"the newest whole checkpoint beside it{'' if needs is None else ' that this run can use'}, saved at {when}"
    if not falls_back:
        raise RuntimeError(f"{said}: give {found}, {what}, or leave out falls_back=False to have it taken.")
    rank_zero_warn(f"{said}; {found} is loaded instead, {what}.")
    return found


def _most_useful(paths: Sequence[Path], needs: Needs | None, weights_only: bool | None) -> Path | None:
    """The first of the whole ones that serve best; None if none does."""
    found, most = None, 0
    for path in paths:
        if most < 2 and not _said(damage_of(path, *_share())):
            use = _of_first(use_of(path, needs, weights_only))
            found, most = (path, use) if use > most else (found, most)
    return found


def damage_of(path: Path, share: int = 0, shares: int = 1) -> str:
    """What is wrong with a checkpoint, in a few words; empty if it is whole. Parts of folders are shared out."""
    if not path.is_dir():
        return damage_of_file(path) if path.exists() else "it is missing"
    try:
        return _damage_of_folder(path, share, shares)
    except OSError as error:
        return f"its parts cannot be read: {error.strerror or error}"
    except ValueError:  # of another writer
        return f"its part {CHECKSUMS} is no list of parts"


def saved_at(path: Path) -> int:
    """When a checkpoint was saved, in nanoseconds since 1970; 0 if it does not say."""
    try:
        seal = read_seal(path / CHECKSUMS if path.is_dir() else path)
    except OSError:
        return 0
    return 0 if seal is None else seal.saved_at


def sweep_orphans(folder: Path) -> None:
    """Removes what killed saves have left, but whole checkpoints that were killed between two renames."""
    sweep(folder, lambda staged: staged.is_dir() and saved_at(staged) > 0 and not target_of(staged).exists())


def _damage_of_folder(path: Path, share: int, shares: int) -> str:
    state, checksums = path / SHARED_STATE, path / CHECKSUMS
    if not state.exists():
        return f"its part {SHARED_STATE} is missing"
    seal = read_seal(state)
    if not checksums.exists():
        if seal is not None:
            return f"its part {CHECKSUMS} is missing"
        if not (path / _LIST_OF_TORCH).exists():
            return f"its part {_LIST_OF_TORCH} is missing"
        return _of_part(SHARED_STATE, damage_of_file(state))
    if damage := damage_of_file(checksums):
        return _of_part(CHECKSUMS, damage)
    listed = read_seal(checksums)
    if seal is None or listed is None or seal.save_id != listed.save_id:
        return f"its parts {SHARED_STATE} and {CHECKSUMS} are of two different saves"
    if damage := damage_of_file(state):
        return _of_part(SHARED_STATE, damage)
    lines = checksums.read_bytes()[: listed.size].decode().splitlines()
    parts = [line.split(" ", 2) for line in lines]
    if missing := [name for _, _, name in parts if not (path / name).exists()]:
        return f"its part {missing[0]} is missing"
    for checksum, size, name in parts[share::shares]:
        if (found := (path / name).stat().st_size) != int(size):
            return f"its part {name} has {found} of {size} bytes"
        if checksum_of(path / name, int(size)) != int(checksum, 16):
            return f"its part {name} is not as it was saved"
    return ""


def _of_part(name: str, damage: str) -> str:
    return f"of its part {name}: {damage}" if damage else ""


def _beside(path: Path) -> list[Path]:
    """Checkpoints in the same folder that say when they were saved."""
    try:
        found = [other for other in path.parent.iterdir() if not other.name.startswith(".") and other != path]
    except OSError:
        return []
    return [other for other in found if not other.is_symlink() and saved_at(other)]


def _newest_first(paths: Sequence[Path]) -> list[Path]:
    return sorted(paths, key=saved_at, reverse=True)


# --- one answer for all processes ---


def _share() -> tuple[int, int]:
    """The rank and the number of processes."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _said(damage: str) -> str:
    """The damage that any process sees."""
    if _share()[1] == 1:
        return damage
    seen: list[str] = [""] * _share()[1]
    torch.distributed.all_gather_object(seen, damage)
    return next((each for each in seen if each), "")


def _of_first(value: T) -> T:
    """The value of the first process."""
    if _share()[1] == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]
