# SPDX-License-Identifier: Apache-2.0
"""Whether a run can go on from a whole checkpoint, to choose one in place of a damaged one, and what is none."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

__all__ = ["SHARED_STATE", "Needs", "check_file", "check_of_lightning", "needs_of", "use_of"]

SHARED_STATE = "meta.pt"  # Lightning's file for what is not sharded, which makes a folder a checkpoint


class Needs(NamedTuple):
    """What a run loads from a checkpoint."""

    resumes: bool  # also the states of optimizers, schedulers and loops, which a file of weights alone lacks
    names: frozenset[str]  # of the entries of the state dict


def needs_of(strategy: Strategy | None) -> Needs | None:
    """What the current run of a strategy loads; None if this is unknown."""
    module = None if strategy is None else strategy.lightning_module
    if module is None:
        return None
    return Needs(module.trainer.state.fn == TrainerFn.FITTING, frozenset(module.state_dict()))


def use_of(path: Path, needs: Needs | None, weights_only: bool | None) -> int:
    """How well a whole checkpoint serves: 2 fully, 1 perhaps (its weights have other names), 0 not.

    Where the needs are unknown, 2 is one from which a fit can go on, and 1 any other.
    """
    try:
        kept, names = _outline(path, bool(weights_only))  # as for Lightning, None is False
    except Exception:  # whatever torch raises: other checkpoints are left
        kept, names = {}, frozenset()
    is_full = "pytorch-lightning_version" in kept and "lr_schedulers" in kept
    if needs is None:
        return 2 if is_full else 1
    if not is_full and (needs.resumes or "pytorch-lightning_version" not in kept):
        return 0
    return 2 if needs.names == names else 1


def _outline(path: Path, weights_only: bool) -> tuple[dict[str, Any], frozenset[str]]:
    """What a checkpoint holds beside its shards, and the names of its weights."""
    if not path.is_dir():
        kept = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        return kept, frozenset(kept["state_dict"])
    places = (FileSystemReader(path).read_metadata().planner_data or {}).values()
    names = frozenset(".".join(map(str, place[1:])) for place in places if place[0] == "state_dict")
    return torch.load(path / SHARED_STATE, map_location="cpu", weights_only=weights_only), names


def check_of_lightning(strategy: Strategy, path: str | Path, loaded: object) -> None:
    """Raises ValueError for what no Trainer has saved, such as a state dict."""
    if isinstance(loaded, dict) and "pytorch-lightning_version" in loaded:
        return
    assert strategy.lightning_module is not None
    state = strategy.lightning_module.trainer.state.fn
    is_state_dict = isinstance(loaded, dict) and loaded and all(isinstance(each, Tensor) for each in loaded.values())
    what = "a state dict" if is_state_dict else f"a {type(loaded).__name__}"
    advice = (
        "load it by load_state_dict, and give no ckpt_path" if is_state_dict else "give a file that a Trainer saved"
    )
    function = "fit" if state is None else state.value
    raise ValueError(
        f"Trainer.{function}(ckpt_path={str(path)!r}): it is {what}, and no checkpoint of Lightning; {advice}."
    )


def check_file(strategy: Strategy, path: Path, weights_only: bool | None) -> None:
    """The same for a file that is not loaded yet; not for a folder."""
    if path.is_file():
        check_of_lightning(strategy, path, torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only))
