# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled extension, or states why it is absent. The only file that knows whether it exists."""

import functools
import importlib
import importlib.util
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch  # the extension finds libtorch already loaded

from lightning_optkit._checks import check_one_of
from lightning_optkit._torch_private import mark_constant

__all__ = [
    "cuda_library",
    "extension",
    "has_cuda_kernels",
    "missing_reason",
    "node",
    "warn_once_if_missing",
    "why_no_cuda_kernels",
    "why_no_look",
    "why_no_node",
]


def _load() -> tuple[ModuleType | None, str]:
    if importlib.util.find_spec("lightning_optkit._C") is None:
        return None, "it was not built (no C++ compiler at installation, or OPTKIT_EXTENSION=0)"
    try:
        _C = importlib.import_module("lightning_optkit._C")
    except ImportError as error:
        return None, f"it does not load: {error}"
    wanted = os.environ.get("OPTKIT_CPU_ISA")
    if wanted:
        check_one_of("environment", "OPTKIT_CPU_ISA", wanted, _C.cpu_isas())
        _C.use_cpu_isa(wanted)
    return _C, ""


def _load_node() -> tuple[ModuleType | None, str]:
    if extension is None:
        return None, missing_reason
    if importlib.util.find_spec("lightning_optkit._node") is None:
        return None, "it was not built (OPTKIT_NODE=0, or torch's headers did not compile)"
    try:
        _node = importlib.import_module("lightning_optkit._node")
    except ImportError as error:
        return None, f"it does not load: {error}"
    if torch.__version__.split("+")[0] != _node.TORCH_VERSION:
        return None, f"it was built with torch {_node.TORCH_VERSION}, and this is {torch.__version__}"
    return _node, ""


def _connect() -> str:
    """Passes the tensor accessors to the extension. Returns the reason if there are none, or ""."""
    if extension is None:
        return missing_reason
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    can_exchange = capsule is not None and extension.open_exchange(
        capsule, torch.Tensor, torch.Tensor.__torch_dispatch__
    )
    if node is not None:
        extension.use_look(node.look)
    return "" if node is not None or can_exchange else "this torch shows its tensors in a way unknown to this build"


extension, missing_reason = _load()
# The library that uses torch's unstable headers, and so works with one torch only: the norms' C++ autograd node, and a
# faster inspection of tensors.
node, why_no_node = _load_node()
why_no_look = _connect()
_warned = False


def warn_once_if_missing() -> None:
    """Warns, once per process, that everything runs on the plain PyTorch reference path."""
    global _warned
    if extension is None and not _warned:
        _warned = True
        warnings.warn(
            f"lightning_optkit runs without its compiled extension: {missing_reason}. "
            "Numbers are the same, but a step takes several times as long as torch's own: leave out Fuse. "
            "`optkit info` says more.",
            stacklevel=3,
        )


def cuda_library() -> Path | None:
    """Path of the CUDA kernels, if they were built. Does not load them."""
    path = Path(__file__).parent / "liboptkit_cuda.so"
    return path if path.exists() else None


@functools.cache
def why_no_cuda_kernels() -> str | None:
    """Loads the CUDA kernels once. Returns the reason if that is impossible, or None."""
    if extension is None:
        return missing_reason
    path = cuda_library()
    if path is None:
        return "the CUDA kernels were not built (no nvcc at installation, or OPTKIT_CUDA=0)"
    try:
        extension.open_cuda(str(path))
    except RuntimeError as error:
        return str(error)
    return None


def has_cuda_kernels() -> bool:
    """Whether `why_no_cuda_kernels()` is None."""
    return why_no_cuda_kernels() is None


mark_constant(has_cuda_kernels)  # torch's compiler cannot trace it
