# SPDX-License-Identifier: Apache-2.0
"""Checks of files and of saved state."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_optkit._checks._shown import shown

__all__ = ["check_path", "check_state"]


def check_path(
    owner: str, name: str, value: str | os.PathLike[str], *, exists: bool = False, kind: str = "file"
) -> Path:
    """Returns `value` as a path.

    Args:
        owner: Owner of the argument, for the message.
        name: Name of the argument.
        value: The argument.
        exists: Whether it must exist.
        kind: What it must be then, for the message: "file" or "folder".

    Raises:
        TypeError: if it is neither a string nor a path.
        ValueError: if it cannot be the name of a file.
        FileNotFoundError: if it must exist and does not.

    Example:
        >>> check_path("Report", "path", "report.html").name
        'report.html'
    """
    if isinstance(value, type) or not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise TypeError(f'{owner}({name}={shown(value)}): {name} must be a path, such as "folder/file".')
    if not str(value) or "\0" in str(value):
        raise ValueError(f'{owner}({name}={shown(value)}): {name} must be a path, such as "folder/file".')
    path = Path(value)
    if exists and not _is_there(path):
        raise FileNotFoundError(f"{owner}({name}={shown(str(value))}): {name} must be a {kind}, and there is none.")
    return path


def check_state(owner: str, state_dict: Any, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """Returns the saved state, if it has a value of the right type for each name; integers must be counts from 0.

    Args:
        owner: Owner of the `load_state_dict`, or the beginning of another call, "Owner.method(argument".
        state_dict: The saved state.
        kinds: The required names and types.

    Raises:
        TypeError: if it is not a dict, or a value has another type.
        ValueError: if a name is missing.

    Example:
        >>> check_state("SnapshotEnsemble", {"paths": []}, paths=list)
        {'paths': []}
    """
    call = owner if "(" in owner else f"{owner}.load_state_dict(state_dict"
    saver = owner.partition(".")[0].partition("(")[0]
    argument = call.partition("(")[2]
    wanted = ", ".join(map(repr, kinds))
    if isinstance(state_dict, type) or not isinstance(state_dict, Mapping):
        raise TypeError(f"{call}={shown(state_dict)}): {argument} must be a dict with {wanted}, as saved by {saver}.")
    for name, kind in kinds.items():
        if name not in state_dict:
            raise ValueError(
                f"{call}={shown(list(state_dict))}): {argument} must hold {wanted}, as saved by {saver}; {name!r} is "
                "missing."
            )
        value = state_dict[name]
        if isinstance(value, int) and not isinstance(value, bool) and kind is not float and not 0 <= value < 2**63:
            raise ValueError(f"{call}[{name!r}]={shown(value)}): {argument} must count {name!r} from 0, below 2**63.")
        kinds_of_one = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds_of_one) or (isinstance(value, bool) and bool not in kinds_of_one):
            raise TypeError(
                f"{call}[{name!r}]={shown(value)}): {argument} must hold {wanted}, as saved by {saver}; {name!r} must "
                f"be {' or '.join(each.__name__ for each in kinds_of_one)}."
            )
    return dict(state_dict)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for the file system
        return False
