# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one command without a network: build, tests, sanitizer, benchmark, one short table.

Needs the machine's own Python (3.10 or newer) with torch 2.10 or newer, pytest and setuptools, and nvcc; nothing is
downloaded. JSON rows go to the folder given, or under benchmarks/results/.

Usage: python benchmarks/gpu_check.py [--output FOLDER] [--minutes 10]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = "test_every_rule_with_every_stage and (adamw or lamb) and (norm or unit or int8 or ema)"


class Check:
    """One line of the table."""

    def __init__(self, name: str, command: list[str], seconds: float, folder: Path) -> None:
        print(f"--- {name}: {' '.join(command)}", flush=True)
        start, log = time.monotonic(), folder / f"{name.replace(' ', '-')}.log"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPTKIT_CUDA": "1"}
        with log.open("w") as file:
            try:
                done = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=max(seconds, 1)
                )
                self.result = "passed" if done.returncode == 0 else f"FAILED ({done.returncode})"
            except subprocess.TimeoutExpired:
                self.result = "OUT OF TIME"
        lines = log.read_text(errors="replace").strip().splitlines()
        print("\n".join(lines[-15:]), flush=True)
        self.name, self.seconds, self.last = name, round(time.monotonic() - start, 1), lines[-1] if lines else ""

    def row(self) -> dict[str, object]:
        """For the JSON file."""
        return {"check": self.name, "result": self.result, "seconds": self.seconds, "last_line": self.last}


def main() -> int:
    """Runs every check that the time allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=10.0, help="end before so many minutes have passed")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes - 20
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "timeout=0"]
    plan = [
        ("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 0.4),
        ("tests", [*pytest[:4], *pytest[5:], "-m", "gpu and not slow", "tests/gpu"], 0.5),
        ("benchmark", [sys.executable, "benchmarks/bench_gpu.py", "--output", str(folder)], 0.7),
    ]
    if shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
            plan.append((tool, [*sanitizer, *pytest, "-m", "gpu and not slow", "-k", SMALL, "tests/gpu"], 0.5))
    checks = []
    for name, command, share in plan:
        checks.append(Check(name, command, (end - time.monotonic()) * share if share < 1 else share, folder))
        if name == "build" and checks[-1].result != "passed":
            break
    rows = [check.row() for check in checks]
    (folder / "gpu-check.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"\n{'check':<12}{'result':<14}{'seconds':>8}  last line")
    for row in rows:
        print(f"{row['check']:<12}{row['result']:<14}{row['seconds']:>8}  {row['last_line']}")
    return 0 if all(row["result"] == "passed" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
