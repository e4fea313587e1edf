# SPDX-License-Identifier: Apache-2.0
"""Builds the extension; the metadata is in pyproject.toml.

OPTKIT_EXTENSION=auto|0|1   build it if there is a C++ compiler | never | fail without one
OPTKIT_CUDA=auto|0|1        add the CUDA kernels if there is an nvcc | never | fail without one
OPTKIT_NODE=auto|0|1        add what only torch's own headers give (the norms' autograd node, a quicker look at
                            tensors) if they compile | never | fail if they do not
TORCH_CUDA_ARCH_LIST        e.g. "9.0;10.0+PTX"; default: what this nvcc knows of 8.0 9.0 10.0 12.0
OPTKIT_ISA=all|native       loops for every instruction set, chosen at run time | for this processor alone, in a third
                            of the time: for builds that are not passed on
MAX_JOBS                    compilers at a time; default: cores, and 2 GB of memory each
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
CUDA_LIBRARY = "liboptkit_cuda"
NODE_LIBRARY = "_node"
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    # gcc 12's own AVX-512 header warns about its deliberately undefined vectors.
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
    " -Wno-maybe-uninitialized",
}
# What csrc/cpu/dispatch.cpp asks of a processor, as Linux names it.
ISA_FEATURES = {
    "baseline": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
}
IS_X86 = os.uname().machine in ("x86_64", "AMD64") if hasattr(os, "uname") else False


def require(package: str, version: str) -> None:
    """Ends the build, in a sentence, with a package older than pyproject.toml allows.

    Without build isolation pip compares nothing, and an old setuptools says "invalid command 'bdist_wheel'".
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    least = re.search(rf'^requires = .*"{package}>=([\d.]+)"', text, flags=re.M)[1]
    have, need = ([int(part) for part in re.findall(r"\d+", each)[:2]] for each in (version, least))
    if have < need:
        sys.exit(
            f"lightning_optkit: building needs {package} >= {least}, and this is {version}: "
            f"pip install '{package}>={least}', then install again."
        )


def choice(variable: str) -> str:
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "0", "1"):
        sys.exit(f"{variable}={value!r}: must be auto, 0 or 1.")
    return value


def instruction_sets() -> dict[str, str]:
    """Name -> compiler flags of the loops that are built."""
    wanted = os.environ.get("OPTKIT_ISA", "all")
    if wanted not in ("all", "native"):
        sys.exit(f"OPTKIT_ISA={wanted!r}: must be all or native.")
    if not IS_X86:
        return {"baseline": ""}
    if wanted == "all":
        return ISA_FLAGS
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        sys.exit("OPTKIT_ISA=native needs /proc/cpuinfo; all builds every instruction set.")
    known = set(next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")).split())
    native = next(isa for isa in reversed(ISA_FLAGS) if ISA_FEATURES[isa] <= known)
    return {native: ISA_FLAGS[native]}


def cxx() -> str | None:
    wanted = choice("OPTKIT_EXTENSION")
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((path for path in map(shutil.which, names) if path), None) if sys.platform != "win32" else None
    if wanted == "1" and not found:
        sys.exit(f"OPTKIT_EXTENSION=1, but there is no C++ compiler (looked for {', '.join(names)}).")
    if wanted == "auto" and not found:
        print(
            "lightning_optkit: no C++ compiler found; installing the plain-PyTorch reference path only.",
            file=sys.stderr,
        )
    return found if wanted != "0" else None


def nvcc() -> str | None:
    wanted = choice("OPTKIT_CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which(str(Path(home) / "bin" / "nvcc")) or shutil.which("nvcc")
    if wanted == "1" and not found:
        sys.exit("OPTKIT_CUDA=1, but there is no nvcc. Set CUDA_HOME.")
    return found if wanted != "0" else None


def cuda_architectures(compiler: str) -> list[str]:
    """-gencode flags: the user's list, or ours as supported by this nvcc, with PTX of the last for newer GPUs."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    ours = [arch for arch in ("8.0", "9.0", "10.0", "12.0") if f"compute_{arch.replace('.', '')}" in known]
    flags = []
    for arch in listed or [*ours[:-1], f"{ours[-1]}+PTX"]:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def max_jobs() -> int:
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(
        1,
        min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, memory // 2**31),
    )


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("lightning_optkit: building the extension needs torch >= 2.10 (or set OPTKIT_EXTENSION=0).")
    require("torch", torch_version(Path(spec.origin).parent))
    return Path(spec.origin).parent


def torch_version(torch: Path) -> str:
    return re.search(r"__version__ = '([^'+]+)", (torch / "version.py").read_text())[1]


class Job(NamedTuple):
    """One call of a compiler or linker; `sources` are its input files."""

    output: str
    command: str
    sources: list[str]
    compiles: bool


class ParallelBuild(build_ext):
    """Compiles all libraries in parallel: with ninja, which is incremental in a checkout, or without it."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith(CUDA_LIBRARY):  # opened by path, not imported: no Python in its name
            return f"{fullname.replace('.', os.sep)}.so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        build = ROOT.resolve() / "build" / f"{sys.implementation.cache_tag}-extension"
        build.mkdir(parents=True, exist_ok=True)
        required = [ext.name for ext in self.extensions if not ext.optional]
        built = [ext.name for ext in self.extensions]
        try:
            try:
                run_jobs([job for name in built for job in jobs_of(name)], build)
            except subprocess.CalledProcessError:
                if built == required:
                    raise
                run_jobs([job for name in required for job in jobs_of(name)], build)
                built = required
                print(
                    "lightning_optkit: torch's headers did not compile; the norms do without an autograd node in C++.",
                    file=sys.stderr,
                )
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                "lightning_optkit: the extension did not compile; the compiler's message is above. "
                "OPTKIT_CUDA=0 leaves the CUDA kernels out, OPTKIT_EXTENSION=0 installs the plain-PyTorch reference."
            ) from error
        for name in built:
            target = Path(self.get_ext_fullpath(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # An atomic replacement: a process that has the old library open is not affected.
            shutil.copyfile(build / f"{name}.so", target.with_suffix(".new"))
            target.with_suffix(".new").replace(target)


def jobs_of(library: str) -> list[Job]:
    if library.endswith(CUDA_LIBRARY):
        return cuda_jobs(library)
    return node_jobs(library) if library.endswith(NODE_LIBRARY) else cpp_jobs(library)


def pybind11_include(torch: Path) -> str:
    try:
        import pybind11
    except ImportError:
        return f"{torch}/include"  # included in torch
    return pybind11.get_include()


def cpp_jobs(library: str) -> list[Job]:
    torch = torch_folder()
    includes = f"-I{CSRC.resolve()} -I{pybind11_include(torch)} -I{sysconfig.get_paths()['include']}"
    torch_includes = f"-isystem {torch}/include -isystem {torch}/include/torch/csrc/api/include"
    # sqrt is vectorized only when it need not set errno; contraction would round differently from CUDA.
    common = "-O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=off -Wall -Wextra"
    extra = os.environ.get("OPTKIT_CXXFLAGS", "")
    libraries = "-undefined dynamic_lookup" if sys.platform == "darwin" else f"-L{torch}/lib -ltorch_cpu -ldl"
    jobs = []
    for source, stem, flags in cpp_units(torch_includes):
        command = (
            f"{COMPILER} -MMD -MF {stem}.o.d {common} {flags} {includes} {extra} -c {source.resolve()} -o {stem}.o"
        )
        jobs.append(Job(f"{stem}.o", command, [str(source.resolve())], True))
    return [*jobs, link(library, f"{COMPILER} -shared {extra}", jobs, libraries)]


def link(library: str, linker: str, jobs: list[Job], libraries: str) -> Job:
    objects = [job.output for job in jobs]
    return Job(f"{library}.so", f"{linker} {' '.join(objects)} -o {library}.so {libraries}", objects, False)


def node_jobs(library: str) -> list[Job]:
    """Jobs with all of torch's headers, for this torch only: the stable ABI has no autograd nodes."""
    torch = torch_folder()
    includes = f"-I{CSRC.resolve()} -I{sysconfig.get_paths()['include']}"
    includes += f" -isystem {torch}/include -isystem {torch}/include/torch/csrc/api/include"
    flags = "-O2 -std=c++20 -fPIC -fvisibility=hidden -Wall -Wextra"
    flags += f" '-DOPTKIT_TORCH_VERSION=\"{torch_version(torch)}\"'"
    # The vptr sanitizer needs type information that torch's libraries hide.
    extra = f"{os.environ.get('OPTKIT_CXXFLAGS', '')} -fno-sanitize=vptr"
    jobs = []
    for stem in ("norm_node", "node_look", "node_gradients"):
        source = (CSRC / f"bindings/{stem}.cpp").resolve()
        command = f"{COMPILER} -MMD -MF {stem}.o.d {flags} {includes} {extra} -c {source} -o {stem}.o"
        jobs.append(Job(f"{stem}.o", command, [str(source)], True))
    libraries = f"-L{torch}/lib -ltorch_python -ltorch_cpu -lc10"
    libraries = "-undefined dynamic_lookup" if sys.platform == "darwin" else libraries
    return [*jobs, link(library, f"{COMPILER} -shared {extra}", jobs, libraries)]


def cpp_units(torch_includes: str) -> list[tuple[Path, str, str]]:
    """(source, object, flags). Only threads.cpp and norm_ops.cpp include torch, whose headers need C++20."""
    units = [
        (CSRC / f"cpu/{name}.cpp", name, "-std=c++17")
        for name in ("walk", "factor_layout", "dispatch", "memory", "layer_norm")
    ]
    bindings = ("plan", "bound_plan", "facts", "membership", "look", "module", "device")
    units += [(CSRC / f"bindings/{name}.cpp", name, "-std=c++17") for name in bindings]
    stable_abi = f"-std=c++20 -DTORCH_TARGET_VERSION=0x020a000000000000 {torch_includes}"
    units += [(CSRC / f"bindings/{name}.cpp", name, stable_abi) for name in ("threads", "norm_ops")]
    isas = instruction_sets()
    if len(isas) == 1:
        units = [(s, name, f"{flags} -DOPTKIT_ONLY_ISA={next(iter(isas))}") for s, name, flags in units]
    for isa, flags in isas.items():
        for name in ("kernels", "layer_norm_kernels"):
            units.append((CSRC / f"cpu/{name}.cpp", f"{name}_{isa}", f"-std=c++17 -DOPTKIT_ISA={isa} {flags}"))
    return units


def cuda_jobs(library: str) -> list[Job]:
    # No contraction and denormals flushed: the same arithmetic as on the CPU.
    flags = f"-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden --fmad=false -ftz=true -I{CSRC.resolve()}"
    compiler = f"{NVCC} {flags} {' '.join(cuda_architectures(NVCC))} --threads {max_jobs()}"
    jobs = []
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        output = f"cuda_{source.stem}.o"
        command = f"{compiler} -MMD -MF {output}.d -c {source.resolve()} -o {output}"
        jobs.append(Job(output, command, [str(source.resolve())], True))
    return [*jobs, link(library, f"{NVCC} -shared -cudart static", jobs, "")]


def ninja_program() -> str:
    """The path of ninja, or "": that of the Python package (maybe copied here), or the system's."""
    places = [None]
    spec = importlib.util.find_spec("ninja")
    if spec is not None and spec.origin is not None:
        import ninja

        places = [ninja.BIN_DIR, str(Path(spec.origin).parents[1] / "bin"), None]
    return next(filter(None, (shutil.which("ninja", path=place) for place in places)), "")


def run_jobs(jobs: list[Job], build: Path) -> None:
    program = ninja_program()
    if not program:
        with ThreadPoolExecutor(max_jobs()) as pool:
            for is_compiler in (True, False):
                chosen = [job for job in jobs if job.compiles == is_compiler]
                list(pool.map(lambda job: subprocess.run(job.command, shell=True, check=True, cwd=build), chosen))
        return
    lines = ["ninja_required_version = 1.8"]
    for name, more in (("compile", ["  depfile = $out.d", "  deps = gcc"]), ("link", [])):
        lines += [f"rule {name}", "  command = $run", "  description = $out", *more]
    for job in jobs:
        rule = "compile" if job.compiles else "link"
        lines += [f"build {job.output}: {rule} {' '.join(job.sources)}", f"  run = {job.command}"]
    (build / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([program, "-C", str(build), f"-j{max_jobs()}"], check=True)


require("setuptools", setuptools.__version__)
COMPILER = cxx()
NVCC = nvcc() if COMPILER else None
libraries = ["lightning_optkit._C"] if COMPILER else []
libraries += [f"lightning_optkit.{NODE_LIBRARY}"] if COMPILER and choice("OPTKIT_NODE") != "0" else []
libraries += [f"lightning_optkit.{CUDA_LIBRARY}"] if NVCC else []
setup(
    ext_modules=[
        Extension(name, sources=[], optional=name.endswith(NODE_LIBRARY) and choice("OPTKIT_NODE") != "1")
        for name in libraries
    ],
    cmdclass={"build_ext": ParallelBuild},
)
