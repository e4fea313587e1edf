# SPDX-License-Identifier: Apache-2.0
"""The description of the installation, with and without each of its parts."""

import importlib.metadata
import struct
import subprocess
import sys

import pytest
import torch

from lightning_optkit import _native
from lightning_optkit.diagnostics import environment as environment_of
from lightning_optkit.diagnostics.environment import _cuda_architectures, environment

MODULE = sys.modules["lightning_optkit.diagnostics.environment"]


def test_the_package_offers_the_function():
    assert environment_of is environment


def test_says_versions_and_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    facts = environment()
    assert facts["torch"].startswith(f"{torch.__version__} (") and facts["torch"].endswith(" build)")
    assert facts["lightning"] == importlib.metadata.version("lightning")
    assert facts["lightning_optkit"] == importlib.metadata.version("lightning_optkit")
    assert facts["threads"].startswith(f"{torch.get_num_threads()} of ")
    assert facts["threads"].endswith("(OMP_NUM_THREADS=2)")


@pytest.mark.parametrize(
    ("cuda", "hip", "build"), [(None, None, "CPU"), ("13.0", None, "CUDA 13.0"), (None, "7.1", "ROCm 7.1")]
)
def test_says_what_torch_was_built_for(monkeypatch, cuda, hip, build):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert environment()["torch"] == f"{torch.__version__} ({build} build)"


@pytest.mark.parametrize("node", [None, object()])
def test_says_whether_the_norms_have_their_node(monkeypatch, node):
    monkeypatch.setattr(_native, "node", node)
    monkeypatch.setattr(_native, "why_no_node", "it was built with torch 2.9")
    assert environment()["autograd node"] == (
        "it was built with torch 2.9" if node is None else "compiled, for this torch"
    )


def test_a_missing_distribution_is_no_error(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(MODULE, "version", version)
    assert environment()["lightning"] == "not installed"


def test_says_which_instruction_set_is_used_and_which_exist(monkeypatch):
    class Extension:
        cpu_isa = staticmethod(lambda: "avx2")
        cpu_isas = staticmethod(lambda: ["avx2", "baseline"])

    monkeypatch.setattr(_native, "extension", Extension)
    monkeypatch.setenv("OPTKIT_CPU_ISA", "avx2")
    facts = environment()
    assert facts["extension"] == "compiled"
    assert facts["instruction set"] == "avx2 (available: avx2, baseline)"
    assert facts["OPTKIT_CPU_ISA"] == "avx2"


def test_says_why_there_is_no_extension(monkeypatch):
    monkeypatch.setattr(_native, "extension", None)
    monkeypatch.setattr(_native, "missing_reason", "it does not load: no such symbol")
    monkeypatch.delenv("OPTKIT_CPU_ISA", raising=False)
    facts = environment()
    assert facts["extension"].startswith("absent: it does not load: no such symbol. ")
    assert facts["instruction set"] == "torch's own"
    assert facts["OPTKIT_CPU_ISA"].startswith("not set")


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ("[always] madvise never\n", "always: every large tensor has them"),
        ("always [madvise] never\n", "madvise: granted to optimizer state on CPU; THP_MEM_ALLOC_ENABLE=1 in the "),
        ("always madvise [never]\n", "never: the kernel grants none; "),
    ],
)
def test_says_whether_the_kernel_grants_huge_pages(monkeypatch, tmp_path, modes, expected):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    monkeypatch.setattr(MODULE, "_HUGE_PAGES", tmp_path / "enabled")
    assert environment()["huge pages"] == "this kernel has no transparent huge pages"
    (tmp_path / "enabled").write_text(modes)
    assert environment()["huge pages"].startswith(expected)


def test_the_hint_is_not_given_to_who_followed_it(monkeypatch, tmp_path):
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setattr(MODULE, "_HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    assert environment()["huge pages"].endswith("and to torch's tensors (THP_MEM_ALLOC_ENABLE=1)")


def fat_binary(*entries):
    body = b""
    for kind, architecture, size in entries:
        body += struct.pack("<HHIQ", kind, 257, 64, size).ljust(28, b"\0") + struct.pack("<I", architecture)
        body += bytes(32 + size)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_architectures_are_read_from_the_largest_fat_binary():
    stub, kernels = fat_binary((2, 75, 100)), fat_binary((2, 80, 5000), (2, 90, 5000), (1, 120, 100), (2, 120, 5000))
    assert _cuda_architectures(b"ELF" + stub + b"code" + kernels + b"end") == ["8.0", "9.0", "12.0+PTX"]


@pytest.mark.parametrize(
    "library", [b"", b"ELF", fat_binary((2, 80, 10))[:20], fat_binary((9, 80, 10)), b"\x50\xed\x55\xba"]
)
def test_architectures_of_what_is_not_understood_are_unknown(library):
    assert _cuda_architectures(library) == []


def test_says_whether_the_cuda_kernels_are_built(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "cuda_library", lambda: None)
    assert environment()["CUDA kernels"].startswith("not built")
    library = tmp_path / "kernels.so"
    library.write_bytes(fat_binary((2, 90, 10)))
    monkeypatch.setattr(_native, "cuda_library", lambda: library)
    assert environment()["CUDA kernels"] == "built for compute capability 9.0"
    library.write_bytes(b"")
    assert environment()["CUDA kernels"] == "built"


def test_never_asks_cuda_nor_imports_lightning():
    code = (
        "import sys, torch\n"
        "def fail(*args, **kwargs): raise AssertionError('asked CUDA')\n"
        "for name in ('init', '_lazy_init', 'is_available', 'device_count', 'current_device'):\n"
        "    setattr(torch.cuda, name, fail)\n"
        "from lightning_optkit import _native\n"
        "if hasattr(_native, 'why_no_cuda_kernels'): _native.why_no_cuda_kernels = fail\n"
        "from lightning_optkit.diagnostics import environment\n"
        "environment()\n"
        "assert 'lightning' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
