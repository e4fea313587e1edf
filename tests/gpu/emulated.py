# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels compiled for this CPU by a C++ compiler: built once, and used by the step.

OPTKIT_EMULATION_FLAGS adds compiler flags, such as -fsanitize=address,undefined.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import torch

from lightning_optkit._native import extension
from lightning_optkit.step import planning
from lightning_optkit.step.cuda import CudaSegment

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "emulation"
# Rounding as on the device: no contraction, and fma in one instruction.
FLAGS = (
    "-std=c++17 -O1 -g1 -fPIC -fvisibility=hidden -mfma -ffp-contract=off -fno-strict-aliasing -U_FORTIFY_SOURCE"
    " -Wall -Wextra -Wno-unknown-pragmas"
)


def why_not():
    """Why the emulation cannot run here, or None."""
    if extension is None:
        return "no compiled extension"
    if torch.cuda.is_available():
        return "a process opens one CUDA library, and here that is the real one"
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        return "the emulation needs x86-64 and g++"
    return None


def build():
    """Path of the library, compiled if a source or a flag changed."""
    extra = os.environ.get("OPTKIT_EMULATION_FLAGS", "")
    folder = ROOT / "build" / f"emulated-{hashlib.sha256(extra.encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), *sorted(EMULATION.glob("*.cpp"))]
    rules = [
        "rule cxx",
        f"  command = g++ {FLAGS} {extra} -MMD -MF $out.d -I{EMULATION} -I{ROOT / 'csrc'} -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ -shared {extra} $in -o $out",
        *(f"build {source.stem}.o: cxx {source}" for source in sources),
        f"build library.so: link {' '.join(f'{source.stem}.o' for source in sources)}",
    ]
    (folder / "build.ninja").write_text("\n".join(rules) + "\n")
    import ninja

    done = subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "library.so"


@functools.cache
def library():
    """The library, open, with the switches of its emulated runtime."""
    path = build()
    extension.open_cuda(str(path))
    return ctypes.CDLL(str(path))


class EmulatedSegment(CudaSegment):
    """The CUDA path over tensors of the CPU."""

    def _device_number(self, param):
        return 0

    @property
    def _stream(self):
        return 0


@contextlib.contextmanager
def cuda():
    """Optimizers take the CUDA path, emulated, for every parameter that would take the compiled path of the CPU."""
    library()
    with mock.patch.object(planning, "CompiledSegment", EmulatedSegment):
        yield


@contextlib.contextmanager
def order(seed):
    """The order of blocks and threads: 0 forward, 1 backward, else shuffled."""
    library().emulated_order(seed)
    try:
        yield
    finally:
        library().emulated_order(0)


@contextlib.contextmanager
def capture():
    """Records launches instead of running them, as in a graph; `library().emulated_replay()` runs them."""
    library().emulated_capture(1)
    try:
        yield
    finally:
        library().emulated_capture(0)
