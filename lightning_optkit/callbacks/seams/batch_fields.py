# SPDX-License-Identifier: Apache-2.0
"""Reads and replaces one field of a batch: an item of a dict, tuple or list, or an attribute of a dataclass."""

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeAlias

from torch import Tensor

from lightning_optkit._checks import shown

__all__ = ["Field", "check_field", "field_of", "with_field"]

# A list is a path into nested batches: ["inputs", 0].
Field: TypeAlias = int | str | list[int | str]


def check_field(owner: str, name: str, field: Field) -> tuple[int | str, ...]:
    """The path of `field`.

    Raises:
        TypeError: if it is neither an int, a string nor a list of them.

    Example:
        >>> check_field("Preprocess", "field", ["inputs", 0])
        ('inputs', 0)
    """
    path = tuple(field) if isinstance(field, list | tuple) else (field,)
    if not path or any(isinstance(step, bool) or not isinstance(step, int | str) for step in path):
        raise TypeError(f"{owner}({name}={shown(field)}): {name} must be a position, a name, or a list of both.")
    return path


def field_of(owner: str, name: str, batch: Any, path: tuple[int | str, ...]) -> Any:
    """The value at `path`. A bare tensor is its own field 0; an empty batch is None.

    Raises:
        ValueError: if the batch has no such field.
    """
    value = batch
    for step in path:
        value = None if value is None else _item(owner, name, value, step)
    return value


def with_field(batch: Any, path: tuple[int | str, ...], value: Any) -> Any:
    """A batch of the same type with `value` at the existing `path`; `batch` is not changed."""
    if not path or isinstance(batch, Tensor):
        return value
    step, rest = path[0], path[1:]
    value = with_field(_item("", "", batch, step), rest, value)
    if isinstance(batch, tuple):
        position = batch._fields.index(step) if isinstance(step, str) else step  # type: ignore[attr-defined]
        items = [*batch]
        items[position] = value
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    changed = copy.copy(batch)
    if isinstance(changed, MutableMapping | list):
        changed[step] = value  # type: ignore[index]
    else:
        object.__setattr__(changed, step, value)  # type: ignore[arg-type]  # also in a frozen dataclass
    return changed


def _item(owner: str, name: str, batch: Any, step: int | str) -> Any:
    if isinstance(batch, Tensor) and step == 0:
        return batch
    if isinstance(batch, Mapping) and step in batch:
        return batch[step]
    is_sequence = isinstance(batch, Sequence) and not isinstance(batch, str)
    if is_sequence and isinstance(step, int) and -len(batch) <= step < len(batch):
        return batch[step]
    if isinstance(step, str) and step in _attributes(batch):
        return getattr(batch, step)
    raise ValueError(f"{owner}({name}={shown(step)}): the batch must have this field; it is {_described(batch)}.")


def _attributes(batch: Any) -> tuple[str, ...]:
    if is_dataclass(batch):
        return tuple(batch.__dataclass_fields__)
    return getattr(batch, "_fields", ())


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} of {', '.join(map(repr, batch)) or 'nothing'}"
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if _attributes(batch):
        return f"a {type(batch).__name__} of {', '.join(map(repr, _attributes(batch)))}"
    if isinstance(batch, Sequence):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"
