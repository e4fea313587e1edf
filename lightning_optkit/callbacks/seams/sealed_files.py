# SPDX-License-Identifier: Apache-2.0
"""Files that end in a seal: one line with the save they belong to, its time, and the length and checksum before it.

The seal follows the end of torch's archive, where `torch.load` and other readers of zip files do not look.
"""

import os
import re
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

__all__ = ["Seal", "SealingFile", "checksum_of", "damage_of_file", "read_seal", "seal_file"]

BLOCK = 1 << 22
_LINE = re.compile(rb"\nlightning_optkit save ([0-9a-f]{32}) at (\d{20}) bytes ([0-9a-f]{16}) crc32 ([0-9a-f]{8})\n")
_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80\x02"  # of torch before 1.6
_ZIP_END = b"PK\x05\x06"
_ZIP_END_LENGTH = 22


class Seal(NamedTuple):
    """The last line of a file."""

    save_id: str
    saved_at: int  # nanoseconds since 1970
    size: int  # of the file without its seal
    checksum: int  # CRC-32 of everything before, including the fields above

    def head(self) -> bytes:
        """The line as far as the checksum covers it."""
        return f"\nlightning_optkit save {self.save_id} at {self.saved_at:020d} bytes {self.size:016x} crc32 ".encode()

    def line(self) -> bytes:
        return self.head() + f"{self.checksum:08x}\n".encode()


_LENGTH = len(Seal("0" * 32, 0, 0, 0).line())


class SealingFile:
    """Passes data on to `file`, and seals it at the end.

    An error is kept until `seal()`: torch's writer ends the process if a file raises inside of it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size, self._checksum = file, 0, 0
        self._error: OSError | None = None

    def write(self, data: bytes) -> int:
        length = memoryview(data).nbytes
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
            self._size += length
            self._checksum = zlib.crc32(data, self._checksum)
        return length

    def flush(self) -> None:
        """Left to the end."""

    def seal(self, save_id: str, saved_at: int) -> None:
        if self._error is not None:
            raise self._error
        seal = Seal(save_id, saved_at, self._size, 0)
        self._file.write(seal._replace(checksum=zlib.crc32(seal.head(), self._checksum)).line())
        self._file.flush()


def seal_file(path: Path, save_id: str, saved_at: int) -> None:
    """Seals a file that another writer has written."""
    size = path.stat().st_size
    seal = Seal(save_id, saved_at, size, 0)
    with path.open("ab") as file:
        file.write(seal._replace(checksum=zlib.crc32(seal.head(), checksum_of(path, size))).line())
        file.flush()
        os.fsync(file.fileno())


def read_seal(path: Path) -> Seal | None:
    """The last line, unchecked; None if the file has no seal."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _LENGTH))
        match = _LINE.fullmatch(file.read())
    if match is None:
        return None
    save_id, saved_at, length, checksum = match.groups()
    return Seal(save_id.decode(), int(saved_at), int(length, 16), int(checksum, 16))


def checksum_of(path: Path, size: int) -> int:
    """CRC-32 of the first `size` bytes."""
    checksum = 0
    with path.open("rb") as file:
        while size > 0 and (block := file.read(min(size, BLOCK))):
            checksum, size = zlib.crc32(block, checksum), size - len(block)
    return checksum


def damage_of_file(path: Path) -> str:
    """What is wrong with a file, in a few words; empty if it is whole.

    Files without a seal are those of other writers: of torch's archives the lengths and checksums inside are compared,
    and of its older files only the beginning is.
    """
    try:
        seal = read_seal(path)
        if seal is None:
            return _damage_of_archive(path)
        if path.stat().st_size != seal.size + _LENGTH:
            return f"it has {path.stat().st_size - _LENGTH} of {seal.size} bytes"
        same = zlib.crc32(seal.head(), checksum_of(path, seal.size)) == seal.checksum
        return "" if same else "it is not as it was saved"
    except OSError as error:
        return str(error.strerror or error)


def _damage_of_archive(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(len(_ZIP))
        if start != _ZIP:
            if not start.strip(b"\0"):
                return "it begins with zeros" if start else "it is empty"
            return "" if start.startswith(_PICKLE) else "it is not a file that torch saved"
        file.seek(-min(_ZIP_END_LENGTH, file.seek(0, 2)), 2)
        if not file.read().startswith(_ZIP_END):
            return "its end is missing, or other bytes follow it"
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError):
        return "its list of contents cannot be read"
    return f"{part} in it is not as it was saved" if part else ""
