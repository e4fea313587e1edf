# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one command without a network: build, tests, benchmarks, sanitizer, one short table.

Needs the machine's own Python (3.10 or newer) with torch 2.10 or newer, lazy_loader, setuptools, a C++ compiler and
nvcc; nothing is downloaded. pytest, ninja and pybind11 are used where they are installed; without lightning, numpy and
rich the parts that train are left out. build/gpu-packages-3.12.tar.gz (`make gpu-packages`, on another machine) is
unpacked and used.
What matters most comes first, each part has its own share of the time and writes what it has as it goes, so a cut costs
only what was not begun.

JSON rows and logs go to the folder given, to $OUT, or under benchmarks/results/.

Usage: python benchmarks/gpu_check.py [--output FOLDER] [--minutes 10] [--only PART...] [--dry-run]
"""

import argparse
import contextlib
import glob
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ROOT / "build" / f"gpu-packages-{sys.version_info.major}.{sys.version_info.minor}"


@dataclass
class Part:
    """One row of the table."""

    name: str
    command: list[str]
    seconds: float
    """Time limit."""
    needs: tuple[str, ...] = ()
    """Packages without which it is skipped."""
    environment: dict[str, str] = field(default_factory=dict)


def parts(folder: Path, dry: bool) -> list[Part]:
    """In the order in which they are run."""
    python, rows = sys.executable, ["--output", str(folder), *(["--dry-run"] if dry else [])]

    def tests(*arguments: str, minutes: float) -> list[str]:
        options = ["--json", str(folder / "gpu-tests.jsonl"), *(["--dry-run"] if dry else [])]
        return [python, "tests/gpu/run.py", *arguments, *options, "--minutes", str(minutes)]

    def bench(script: str, *names: str, minutes: float) -> list[str]:
        chosen = ["--parts", *names] if names else []
        return [python, f"benchmarks/{script}.py", *rows, *chosen, "--minutes", str(minutes)]

    found = [
        Part("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 300, environment=build_environment(dry)),
        Part("step tests", tests("test_step.py", minutes=1.2), 90),
        Part("step bench", bench("bench_gpu", "step", minutes=0.9), 80),
        Part("norm tests", tests("test_norms.py", minutes=0.9), 75),
        Part("norm bench", bench("bench_gpu_norms", "kernels", minutes=0.8), 70),
        Part("training tests", tests("test_training.py", minutes=1.0), 80),
        Part("lightning bench", bench("bench_gpu_lightning", minutes=0.9), 90, needs=("lightning", "numpy", "rich")),
        Part("states, rules", bench("bench_gpu", "states", "rules", minutes=0.7), 60),
    ]
    tool = sanitizer()
    for kind in ("memcheck", "racecheck") if tool or dry else ():
        command = [tool, "--tool", kind, "--error-exitcode", "9", "--target-processes", "all"] if tool else []
        small = tests("test_step.py", "test_norms.py", "-k", "sanitized", minutes=0.7)
        # Each tensor in an allocation of its own: what is read beside one would else lie in torch's pool.
        found.append(Part(kind, [*command, *small], 60, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    found += [
        Part("peers", bench("bench_gpu", "peers", minutes=0.5), 60),
        Part("norm modules", bench("bench_gpu_norms", "compiled", minutes=0.5), 60),
    ]
    return found


def unpack_packages() -> None:
    """Those that came as one file, if they are not there yet."""
    archive = PACKAGES.with_name(f"{PACKAGES.name}.tar.gz")
    if archive.exists() and not PACKAGES.is_dir():
        shutil.unpack_archive(archive, PACKAGES.parent)


def sanitizer() -> str | None:
    """Path of compute-sanitizer, which is on the path or beside nvcc."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    places = [f"{home}/bin/compute-sanitizer", *glob.glob(f"{home}*/compute-sanitizer/compute-sanitizer")]
    return shutil.which("compute-sanitizer") or next((place for place in places if os.access(place, os.X_OK)), None)


def build_environment(dry: bool) -> dict[str, str]:
    """Compiles only for the installed device, which saves the time for the other architectures."""
    if dry or "TORCH_CUDA_ARCH_LIST" in os.environ:
        return {} if not dry else {"OPTKIT_CUDA": "0"}
    code = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    except subprocess.SubprocessError as error:
        print(f"The device does not say what it is, so all architectures are built: {error}", flush=True)
        return {"OPTKIT_CUDA": "1"}
    return {"OPTKIT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": done.stdout.strip()}


def run(part: Part, folder: Path, left: float) -> dict[str, object]:
    """The part's row. Its output goes to a log, and the end of it to the screen."""
    log = folder / f"gpu-{part.name.replace(' ', '-').replace(',', '')}.log"
    paths = [str(ROOT), *([str(PACKAGES)] if PACKAGES.is_dir() else []), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **part.environment}
    seconds = min(part.seconds, left)
    print(f"--- {part.name}, at most {seconds:.0f} s", flush=True)
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
            result = "passed" if code == 0 else f"FAILED ({code})"
        except subprocess.TimeoutExpired:
            result = "OUT OF TIME"
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").strip().splitlines()
    shown = lines[-8:] if result == "passed" else lines[-25:]
    print("\n".join(line[:240] for line in shown), flush=True)
    last = lines[-1][:100] if lines and not lines[-1].startswith("{") else f"{len(lines)} lines"
    return {"check": part.name, "result": result, "seconds": round(time.monotonic() - began, 1), "last_line": last}


def run_or_not(part: Part, folder: Path, left: float) -> dict[str, object]:
    """The part's row, run only if it can be and there is time."""
    absent = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if not absent and left >= 5:
        return run(part, folder, left)
    why = ("left out", f"not installed: {', '.join(absent)}") if absent else ("NOT RUN", "the time is up")
    return {"check": part.name, "result": why[0], "seconds": 0.0, "last_line": why[1]}


def rows_since(folder: Path, begun: dict[Path, int]) -> list[dict[str, Any]]:
    """Rows that the benchmarks added in this run."""
    found = []
    for path in sorted(folder.glob("*-gpu-*.jsonl")):
        for line in path.read_bytes()[begun.get(path, 0) :].splitlines():
            with contextlib.suppress(ValueError):  # a part that was cut leaves half a line
                found.append(json.loads(line))
    return found


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """A line per row; the norms, of which there are many, in a line per kernel and dtype."""
    norms: dict[str, list[dict[str, Any]]] = {}
    lines = []
    for row in rows:
        if row["benchmark"] == "gpu norms":
            norms.setdefault(f"{row['variant']} {row['dtype']}", []).append(row)
            continue
        what = " ".join(str(row[key]) for key in ("case", "variant") if key in row)
        against = f"{row['ratio']:.2f} x {row['baseline']}" if "ratio" in row else ""
        share = f"{row['share_of_copy']:.0%}" if "share_of_copy" in row else ""
        speed = f"{row['tokens_per_s']} tokens/s, {row['peak_gb']} GB" if "tokens_per_s" in row else ""
        lines.append(f"{what[:52]:<52} {row['median_ms']:>8.3f} ms {share:>5} {(against + speed)[:36]}".rstrip())
    for what, alike in norms.items():
        ratios, shares = ([row[key] for row in alike] for key in ("ratio", "share_of_copy"))
        worst = min(alike, key=lambda row: row["ratio"])["case"]
        lines.append(
            f"{what[:36]:<36} {min(ratios):5.2f} to {max(ratios):5.2f} x torch, least at {worst}; "
            f"{min(shares):.0%} to {max(shares):.0%} of copy"
        )
    return lines


def main() -> int:
    """Runs every part that the time allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--minutes", type=float, default=10.0, help="end before so many minutes have passed")
    parser.add_argument("--only", nargs="*", help="names of parts")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: tests this script")
    arguments = parser.parse_args()
    end, folder = time.monotonic() + 60 * arguments.minutes - 10, arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # The CPU only works on small tensors here; torch may see more cores than are ours.
    os.environ.setdefault("OMP_NUM_THREADS", "1" if arguments.dry_run else "4")
    unpack_packages()
    sys.path.append(str(PACKAGES))
    if importlib.util.find_spec("lazy_loader") is None:
        sys.exit(
            f"gpu_check: lazy_loader must be installed, or {PACKAGES.name}.tar.gz brought along (make gpu-packages)."
        )
    begun = {path: path.stat().st_size for path in folder.glob("*-gpu-*.jsonl")}
    rows: list[dict[str, object]] = []
    for part in parts(folder, arguments.dry_run):
        if arguments.only and part.name not in arguments.only:
            continue
        rows.append(run_or_not(part, folder, end - time.monotonic()))
        with (folder / "gpu-check.jsonl").open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        if part.name == "build" and rows[-1]["result"] != "passed":
            break
    if sanitizer() is None:
        print("compute-sanitizer is not installed: memcheck and racecheck are left out")
    print("\n" + "\n".join(summary(rows_since(folder, begun))))
    print(f"\n{'check':<17}{'result':<14}{'seconds':>8}  last line")
    for row in rows:
        print(f"{row['check']:<17}{row['result']:<14}{row['seconds']:>8}  {row['last_line']}")
    return 0 if all(row["result"] in ("passed", "left out") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
