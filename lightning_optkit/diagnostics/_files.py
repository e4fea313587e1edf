# SPDX-License-Identifier: Apache-2.0
"""Files that are either what they were before or whole, and why one cannot be written."""

import os
from contextlib import nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryFile

__all__ = ["replace_text", "why_unwritable"]


def replace_text(target: Path, text: str, errors: str = "strict") -> None:
    """Writes a file, creating its folders; one that is there is replaced only once the new one is complete.

    Raises:
        OSError: if it cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target = target.resolve()  # a link keeps pointing at it
    if target.exists() and not target.is_file():  # a device or a pipe
        target.write_text(text, encoding="utf-8", errors=errors)
        return
    beside = target.with_name(f".{target.name[:200]}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8", errors=errors)
        os.replace(beside, target)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):  # of the file that was asked for, not of the one beside it
            raise type(error)(error.errno, error.strerror, str(target)) from error
        raise


def why_unwritable(target: Path) -> str:
    """Why no file can be written there, as far as can be told without changing it; "" if nothing speaks against it.

    Example:
        >>> why_unwritable(Path("/"))
        '/ is a folder'
    """
    try:
        target = target.absolute()
        target.exists()
    except OSError as error:  # a name that is too long, or a folder that is no longer there
        return f"of an {type(error).__name__} ({error.strerror})"
    if target.is_dir():
        return f"{target} is a folder"
    there = next(parent for parent in target.parents if parent.exists())
    if not there.is_dir():
        return f"{there} is a file, not a folder"
    place = target if target.exists() else there
    if not (os.access(place, os.W_OK) and os.access(there, os.W_OK)):
        return f"{place} cannot be written"
    try:  # in some folders, as /proc, the permissions allow what cannot be done
        with nullcontext() if target.exists() else TemporaryFile(dir=there):
            return ""
    except OSError as error:
        return f"{there} cannot be written ({error.strerror})"
