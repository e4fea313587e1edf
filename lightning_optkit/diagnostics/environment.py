# SPDX-License-Identifier: Apache-2.0
"""Capabilities of this installation: versions, the compiled extension, instruction sets, threads, huge pages."""

import os
import platform
import struct
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lightning_optkit import _native

__all__ = ["environment"]

_FAT_BINARY = struct.pack("<I", 0xBA55ED50)
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment() -> dict[str, str]:
    """Facts about this process, as text, in display order. Never initializes CUDA, nor loads its kernels.

    Returns:
        Facts by name: printed by `optkit info`, and shown at the end of a report.

    Example:
        >>> environment()["torch"].startswith(torch.__version__)
        True
    """
    return {
        "lightning_optkit": _version("lightning_optkit"),
        "torch": f"{torch.__version__} ({_torch_build()} build)",
        "lightning": _version("lightning"),
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "extension": _extension(),
        "autograd node": _native.why_no_node if _native.node is None else "compiled, for this torch",
        "instruction set": _instruction_set(),
        "OPTKIT_CPU_ISA": os.environ.get("OPTKIT_CPU_ISA") or "not set: the widest that the processor has",
        "CUDA kernels": _cuda_kernels(),
        "threads": _threads(),
        "huge pages": _huge_pages(),
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _torch_build() -> str:
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip is not None else "CPU"


def _extension() -> str:
    if _native.extension is None:
        return f"absent: {_native.missing_reason}. Steps take the plain-PyTorch reference path: same numbers, slower"
    return "compiled"


def _instruction_set() -> str:
    if _native.extension is None:
        return "torch's own"
    return f"{_native.extension.cpu_isa()} (available: {', '.join(_native.extension.cpu_isas())})"


def _cuda_kernels() -> str:
    library = _native.cuda_library()
    if library is None:
        return "not built (no nvcc at installation, or OPTKIT_CUDA=0)"
    architectures = _cuda_architectures(library.read_bytes())
    return f"built for compute capability {', '.join(architectures)}" if architectures else "built"


def _cuda_architectures(library: bytes) -> list[str]:
    """The architectures in the largest fat binary (smaller ones are nvcc's link stubs); [] if parsing fails.

    NVIDIA does not document the layout: a header of magic, version, header size, size; then entries of kind (1 PTX, 2
    machine code), version, header size, size, and the architecture 28 bytes into the header.
    """
    found: list[str] = []
    largest = 0
    start = library.find(_FAT_BINARY)
    while 0 <= start <= len(library) - 16:
        _, _, header, size = struct.unpack_from("<IHHQ", library, start)
        if largest < size <= len(library) - start - header:
            largest, found = size, _entries(library, start + header, start + header + size)
        start = library.find(_FAT_BINARY, start + 1)
    return found


def _entries(library: bytes, at: int, end: int) -> list[str]:
    kinds: dict[int, set[int]] = {}
    while at + 32 <= end:
        kind, _, header, size = struct.unpack_from("<HHIQ", library, at)
        (architecture,) = struct.unpack_from("<I", library, at + 28)
        if kind not in (1, 2) or not 10 <= architecture < 1000 or header < 32:
            return []
        kinds.setdefault(architecture, set()).add(kind)
        at += header + size
    return [f"{a // 10}.{a % 10}{'+PTX' if 1 in kinds[a] else ''}" for a in sorted(kinds)]


def _threads() -> str:
    wanted = os.environ.get("OMP_NUM_THREADS")
    source = f"OMP_NUM_THREADS={wanted}" if wanted else "OMP_NUM_THREADS not set"
    return f"{torch.get_num_threads()} of {os.cpu_count()} processors ({source})"


def _huge_pages() -> str:
    try:
        modes = _HUGE_PAGES.read_text()
    except OSError:
        return "this kernel has no transparent huge pages"
    mode = modes.partition("[")[2].partition("]")[0]
    if mode == "always":
        return "always: every large tensor has them"
    if mode != "madvise":
        return f"{mode}: the kernel grants none; `madvise` in {_HUGE_PAGES} makes large steps faster"
    granted = "madvise: granted to optimizer state on CPU"
    if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1":
        return f"{granted}, and to torch's tensors (THP_MEM_ALLOC_ENABLE=1)"
    return f"{granted}; THP_MEM_ALLOC_ENABLE=1 in the environment gives the same to torch's own tensors"
