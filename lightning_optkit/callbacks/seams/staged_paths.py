# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are written beside their target and renamed when they are whole.

Whoever writes one holds a lock on it, which the system releases with the process: what is not locked is an orphan.
Windows has neither these locks nor durable folders: there orphans stay, and the rest is the same.
"""

import ctypes
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_optkit.callbacks.seams.sealed_files import SealingFile

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "naming",
    "put_in_place",
    "remove",
    "staged_folder",
    "staged_path",
    "staged_paths_of",
    "sweep",
    "sync",
    "target_of",
    "write_file",
]

_SUFFIX = ".saving"
_REPLACED = ".replaced"
_LONGEST_NAME = 150  # of 255 bytes
_AGE_OF_EMPTY = 60.0  # seconds: a younger empty one may be about to be locked
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def staged_path(target: Path, save_id: str) -> Path:
    """Where the save `save_id` writes what becomes `target`."""
    return target.with_name(f".{target.name[:_LONGEST_NAME]}.{save_id}{_SUFFIX}")


def target_of(staged: Path) -> Path:
    """What a staged path was to become; of a long name only the beginning is known."""
    return staged.with_name(staged.name.removeprefix(".").removesuffix(_SUFFIX).removesuffix(_REPLACED)[:-33])


def staged_paths_of(target: Path) -> list[Path]:
    """What unfinished saves of `target` have left."""
    return [path for path in _staged(target.parent) if path.name.startswith(f".{target.name[:_LONGEST_NAME]}.")]


@contextmanager
def naming(target: Path) -> Iterator[None]:
    """Errors of writing `target` say which checkpoint it was, and what to do."""
    try:
        yield
    except OSError as error:
        said = f"SafeCheckpointIO: {target} was not written ({error.strerror or error}) and is as it was before"
        raise OSError(
            error.errno, f"{said}: make room in {target.parent} or make it writable, and save again"
        ) from error


def write_file(
    target: Path,
    write: Callable[[SealingFile], object],
    save_id: str,
    saved_at: int,
    replaces_folder: bool = False,
) -> None:
    """Replaces `target` by a sealed file, durably; on an error `target` is as before, and nothing else is left.

    Args:
        target: The path of the file.
        write: Writes the content.
        save_id: The save it belongs to.
        saved_at: Its time, in nanoseconds since 1970.
        replaces_folder: Whether `target` may be a folder, which is removed with all that is in it.
    """
    staged = staged_path(target, save_id)
    try:
        with staged.open("xb") as file:
            _lock(file.fileno())
            sealing = SealingFile(file)
            write(sealing)
            sealing.seal(save_id, saved_at)
            os.fsync(file.fileno())
            if replaces_folder and target.is_dir() and not target.is_symlink():
                _replace_folder(staged, target)
            else:
                os.replace(staged, target)
    except BaseException:
        with suppress(OSError):
            staged.unlink()
        raise
    sync(target.parent)


def _replace_folder(staged: Path, target: Path) -> None:
    """Puts a file in place of a folder, in one step where the system can."""
    folder = staged
    if not _exchange(staged, target):
        folder = staged.with_name(f"{staged.name.removesuffix(_SUFFIX)}{_REPLACED}{_SUFFIX}")
        target.rename(folder)
        staged.rename(target)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def staged_folder(staged: Path) -> Iterator[None]:
    """Creates a staged path as an empty, locked folder, and removes it at the end unless it was renamed."""
    staged.mkdir()
    descriptor = os.open(staged, os.O_RDONLY)
    _lock(descriptor)
    try:
        yield
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        os.close(descriptor)


def put_in_place(staged: Path, target: Path) -> None:
    """Renames a whole folder to `target`; what was there goes to `staged`, in one step where the system can."""
    if target.is_dir() and not target.is_symlink():
        if not _exchange(staged, target):
            moved = staged.with_name(f"{staged.name.removesuffix(_SUFFIX)}{_REPLACED}{_SUFFIX}")
            target.rename(moved)
            staged.rename(target)
            moved.rename(staged)
    else:
        target.unlink(missing_ok=True)
        staged.rename(target)
    sync(target.parent)


def remove(target: Path, save_id: str) -> None:
    """Removes a folder; stopped on the way, it leaves an orphan and not a damaged checkpoint."""
    staged = staged_path(target, save_id)
    target.rename(staged)
    shutil.rmtree(staged)


def sweep(folder: Path, keep: Callable[[Path], bool]) -> None:
    """Removes what saves that were killed have left in `folder`, but what `keep` names."""
    if fcntl is None:
        return
    for path in _staged(folder):
        with suppress(OSError):  # removed by another process, or not ours to remove
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_folder = path.is_dir()
                is_empty = not any(path.iterdir()) if is_folder else path.stat().st_size == 0
                if (is_empty and time.time() - path.stat().st_mtime < _AGE_OF_EMPTY) or keep(path):
                    continue
                shutil.rmtree(path) if is_folder else path.unlink()
            finally:
                os.close(descriptor)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk; some file systems cannot for folders."""
    if fcntl is None and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _staged(folder: Path) -> list[Path]:
    return sorted(folder.glob(f".*{_SUFFIX}"))


def _lock(descriptor: int) -> None:
    if fcntl is None:
        return
    with suppress(OSError):  # without locks the file system cannot tell orphans, and none are swept
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step; False where the system or the file system cannot."""
    if fcntl is None:
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
