# SPDX-License-Identifier: Apache-2.0
"""The uniform mean of the weights of several checkpoints.

Source: Vaswani et al. 2017, "Attention Is All You Need", section 6.1 (the last checkpoints of one run); Wortsman et al.
2022, "Model soups", arXiv:2203.05482, section 3 ("uniform soup": fine-tuned from one pre-trained network).
"""

import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_optkit._checks import check_listed, check_path, shown

__all__ = [
    "Checkpoint",
    "Mean",
    "average_checkpoints",
    "check_checkpoints",
    "check_output",
    "load_weights",
    "read_weights",
    "write_output",
]

Checkpoint: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]
"""A checkpoint file, or a state dict."""

_OF_TRAINING = ("callbacks", "optimizer_states", "lr_schedulers", "loops", "current_model_state")


def average_checkpoints(
    checkpoints: Sequence[Checkpoint], output: str | os.PathLike[str] | None = None
) -> dict[str, Tensor]:
    """Mean of the weights of checkpoints of one network, e.g. the last few of one run.

    Floating-point entries are summed in at least fp32 and returned in their own dtype; integer entries
    (`num_batches_tracked`) are those of the last checkpoint. BatchNorm's running statistics are averaged like weights;
    for exact ones, recompute them with `torch.optim.swa_utils.update_bn`.

    Args:
        checkpoints: Files written by Lightning or by `torch.save(model.state_dict(), ...)`, or state dicts; at least
            one.
        output: Optional path of a checkpoint to write: the last file's hyperparameters and versions with the mean as
            its `state_dict`, for `load_from_checkpoint` and `trainer.test(ckpt_path=...)`; no training state.

    Returns:
        The mean, as a state dict on CPU.

    Raises:
        TypeError: if they are not a list, or one is neither a path nor a state dict.
        FileNotFoundError: if a file does not exist.
        ValueError: if there is none, if one is damaged or cannot be read safely, or if names or shapes differ.

    Example:
        >>> average_checkpoints([{"w": torch.zeros(2)}, {"w": torch.ones(2)}])
        {'w': tensor([0.5000, 0.5000])}
    """
    checkpoints = check_checkpoints("average_checkpoints", checkpoints)
    target = check_output("average_checkpoints", output)
    mean = Mean("average_checkpoints", checkpoints[0])
    for checkpoint in checkpoints[1:]:
        mean.add(checkpoint)
    averaged = mean.read()
    if target is not None:
        write_output("average_checkpoints", target, checkpoints[-1], averaged)
    return averaged


def check_output(owner: str, output: str | os.PathLike[str] | None) -> Path | None:
    """`output` of `owner` as a path, or None.

    Raises:
        ValueError: if no file can be written there.
    """
    target = None if output is None else check_path(owner, "output", output)
    if target is not None and (target.is_dir() or not target.parent.is_dir()):
        raise ValueError(f"{owner}(output={str(target)!r}): output must be a file in a folder that exists.")
    return target


def write_output(owner: str, target: Path, last: Checkpoint, averaged: dict[str, Tensor]) -> None:
    """Writes the checkpoint `last` with `averaged` as its weights, and without the state of a training."""
    rest = {} if isinstance(last, Mapping) else _load(owner, "checkpoints", last)
    kept = {key: value for key, value in rest.items() if key not in _OF_TRAINING} if "state_dict" in rest else {}
    torch.save({**kept, "state_dict": averaged}, target)


def load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The `state_dict` of a Lightning checkpoint, or a plain state dict, on CPU; only tensors are unpickled.

    Args:
        checkpoint: See `average_checkpoints`.

    Raises:
        TypeError: if it is neither a path nor a state dict.
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is damaged, cannot be read safely, or contains no state dict.
    """
    return read_weights("load_weights", "checkpoint", checkpoint)


def read_weights(owner: str, name: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The same for argument `name` of `owner`."""
    loaded: Mapping[str, Any] = checkpoint if isinstance(checkpoint, Mapping) else _load(owner, name, checkpoint)
    weights: Any = loaded.get("state_dict", loaded)
    items = weights.items() if isinstance(weights, Mapping) else ()
    tensors = {key: value for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{owner}({name}={_shown(checkpoint)}): it must hold a state dict.")
    return tensors


def check_checkpoints(owner: str, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints as a list, at least one; a single path is not accepted as a list."""
    such_as = 'a list of files or state dicts, such as ["last.ckpt"]'
    return check_listed(owner, "checkpoints", checkpoints, such_as)


def _load(owner: str, name: str, checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    path = check_path(owner, name, checkpoint, exists=True)
    call = f"{owner}({name}={str(path)!r})"
    if path.is_dir():
        raise ValueError(
            f"{call}: it must be a file; consolidate a sharded checkpoint first by "
            "`python -m lightning.pytorch.utilities.consolidate_checkpoint`."
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        reason = f"{type(error).__name__}: {shown(str(error).splitlines()[0] if str(error) else '')}"
        if isinstance(error, pickle.UnpicklingError) and "Unsupported global" in str(error):
            raise ValueError(
                f"{call}: it must hold tensors and plain types only; allow its other classes by "
                f"torch.serialization.add_safe_globals ({reason})."
            ) from error
        raise ValueError(f"{call}: it must be a whole file written by torch.save ({reason}).") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{call}: it must hold a state dict.")
    return loaded


def _shown(checkpoint: Checkpoint) -> str:
    return "a state dict" if isinstance(checkpoint, Mapping) else repr(Path(checkpoint).name)


class Mean:
    """A running mean of state dicts, summed in at least fp32.

    Args:
        owner: Function named in error messages.
        first: The checkpoint that the others must match.
        name: The argument of the checkpoints.
    """

    def __init__(self, owner: str, first: Checkpoint, name: str = "checkpoints") -> None:
        self._owner, self._first, self._name = owner, first, name
        self._last = read_weights(owner, name, first)
        self._sum = {name: _summand(value, copy=True) for name, value in self._last.items()}
        self._count = 1

    def check(self, weights: Mapping[str, Tensor], checkpoint: Checkpoint, number: int) -> None:
        """Raises ValueError, naming the first key that differs, unless `weights` have the same names and shapes."""
        owner = f"{self._owner}({self._name}=[...]): soup of incompatible checkpoints"
        first, here = f"number 1 ({_shown(self._first)})", f"number {number} ({_shown(checkpoint)})"
        for name, value in self._sum.items():
            if name not in weights:
                raise ValueError(f"{owner}; {name!r} is in {first} and not in {here}.")
            shapes = list(value.shape), list(weights[name].shape)
            if shapes[0] != shapes[1]:
                raise ValueError(f"{owner}; {name!r} has shape {shapes[0]} in {first}, {shapes[1]} in {here}.")
        for name in weights:
            if name not in self._sum:
                raise ValueError(f"{owner}; {name!r} is in {here} and not in {first}.")

    def add(self, checkpoint: Checkpoint) -> None:
        """Adds one checkpoint."""
        weights = read_weights(self._owner, self._name, checkpoint)
        self.check(weights, checkpoint, self._count + 1)
        for name, value in weights.items():
            if _is_averaged(value):
                self._sum[name] += _summand(value)
        self._last, self._count = weights, self._count + 1

    def read(self, candidate: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The mean, including `candidate` if given."""
        last = self._last if candidate is None else candidate
        count = self._count + (candidate is not None)
        read: dict[str, Tensor] = {}
        for name, value in last.items():
            if _is_averaged(value):
                total = self._sum[name] if candidate is None else self._sum[name] + _summand(value)
                read[name] = (total / count).to(value.dtype)
            else:
                read[name] = value.clone()
        return read


def _is_averaged(value: Tensor) -> bool:
    return value.dtype.is_floating_point or value.dtype.is_complex


def _summand(value: Tensor, copy: bool = False) -> Tensor:
    dtype = torch.promote_types(value.dtype, torch.float32) if _is_averaged(value) else value.dtype
    return value.detach().to(dtype, copy=copy)
