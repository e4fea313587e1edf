# SPDX-License-Identifier: Apache-2.0
"""A copy of a batch, for a pass over it that the run does not know of: `training_step` may change it in place."""

import copy
from collections.abc import MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["copied_batch"]


def copied_batch(batch: Any) -> Any:
    """The batch with tensors, arrays and containers of its own; a tensor that stands in two places still does.

    An object of another kind is copied if it has a `clone`, as a batch of graphs, and is otherwise the same object.

    Example:
        >>> import torch
        >>> batch = {"x": torch.zeros(1), "name": ["a"]}
        >>> copied_batch(batch)["x"].add_(1), batch["x"]
        (tensor([1.]), tensor([0.]))
    """
    return _copied(batch, {})


def _copied(value: Any, made: dict[int, Any]) -> Any:
    if id(value) not in made:
        made[id(value)] = _copy(value, made)
    return made[id(value)]


def _copy(value: Any, made: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        # Of its own storage: a part of a batch is a view of the whole.
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, tuple):
        parts = [_copied(each, made) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if not isinstance(value, list | dict) and callable(getattr(value, "clone", None)):
        return value.clone()
    if isinstance(value, list | MutableMapping):
        result: Any = copy.copy(value)
        for key, each in value.items() if isinstance(value, MutableMapping) else enumerate(value):
            result[key] = _copied(each, made)
        return result
    if is_dataclass(value) and not isinstance(value, type):
        result = copy.copy(value)
        for field in fields(value):
            object.__setattr__(result, field.name, _copied(getattr(value, field.name), made))  # it may be frozen
        return result
    return value
