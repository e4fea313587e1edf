# SPDX-License-Identifier: Apache-2.0
"""The GPU check: a part that hangs, fails or is interrupted does not affect the results of the others."""

import importlib
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
gpu_check = importlib.import_module("gpu_check")
PYTHON = [sys.executable, "-c"]


def is_running(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_part_that_hangs_is_ended_with_its_children_and_keeps_what_it_wrote(tmp_path):
    code = "import subprocess; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"
    row = gpu_check.run(gpu_check.Part("a, b", [*PYTHON, code], 5.0), tmp_path, 60.0)
    child = (tmp_path / "gpu-a-b.log").read_text().strip()
    assert (row["check"], row["result"], row["last_line"]) == ("a, b", "OUT OF TIME", child)
    assert row["seconds"] < 30
    end = time.monotonic() + 10
    while is_running(int(child)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(int(child))


def test_a_part_that_fails_says_how(tmp_path):
    row = gpu_check.run(gpu_check.Part("bad", [*PYTHON, "import sys; sys.exit(3)"], 60.0), tmp_path, 60.0)
    assert row["result"] == "FAILED (3)"


def test_a_part_is_not_begun_without_its_packages_or_time(tmp_path):
    part = gpu_check.Part("none", [*PYTHON, "1 / 0"], 60.0, needs=("json", "no_such_package"))
    row = gpu_check.run_or_not(part, tmp_path, 60.0)
    assert (row["result"], row["last_line"]) == ("left out", "not installed: no_such_package")
    assert gpu_check.run_or_not(gpu_check.Part("late", [*PYTHON, "1 / 0"], 60.0), tmp_path, 4.0)["result"] == "NOT RUN"
    assert not list(tmp_path.iterdir())


def test_only_rows_of_this_run_are_summed_up_and_half_a_line_is_no_row(tmp_path):
    path = tmp_path / "2026-01-01-gpu-norms-x.jsonl"
    row = dict(benchmark="gpu norms", case="old", dtype="float32", variant="forward", ratio=0.1, share_of_copy=0.1)
    path.write_text(json.dumps(row) + "\n")
    begun = {path: path.stat().st_size}
    new = [dict(row, case=f"{k} x 8", ratio=1.0 + k, share_of_copy=0.5 + k / 10) for k in range(3)]
    step = dict(benchmark="gpu step", case="4 M", variant="AdamW", median_ms=0.5, ratio=2.0, baseline="torch fused")
    with path.open("a") as file:
        file.write("".join(json.dumps(one) + "\n" for one in [*new, step]) + '{"benchmark": "gpu')
    rows = gpu_check.rows_since(tmp_path, begun)
    assert rows == [*new, step]
    lines = gpu_check.summary(rows)
    assert len(lines) == 2
    assert lines[0].split() == ["4", "M", "AdamW", "0.500", "ms", "2.00", "x", "torch", "fused"]
    assert lines[1].startswith("forward float32 ")
    assert lines[1].endswith("1.00 to  3.00 x torch, least at 0 x 8; 50% to 70% of copy")


def test_packages_that_came_as_one_file_are_unpacked_once(tmp_path, monkeypatch):
    folder = tmp_path / "gpu-packages"
    folder.mkdir()
    program = folder / "program"
    program.write_text("1")
    program.chmod(0o755)
    with tarfile.open(tmp_path / "gpu-packages.tar.gz", "w:gz") as file:
        file.add(folder, "gpu-packages")
    monkeypatch.setattr(gpu_check, "PACKAGES", folder)
    program.write_text("2")
    gpu_check.unpack_packages()
    assert program.read_text() == "2"
    program.unlink()
    folder.rmdir()
    gpu_check.unpack_packages()
    assert program.read_text() == "1" and program.stat().st_mode & 0o100


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
def test_a_dry_run_writes_rows_and_ends_with_a_table(tmp_path):
    script = ROOT / "benchmarks" / "gpu_check.py"
    only = ["--only", "memcheck", "norm modules"]
    done = subprocess.run(
        [sys.executable, script, "--dry-run", "--output", tmp_path, *only], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checks = [json.loads(line) for line in (tmp_path / "gpu-check.jsonl").read_text().splitlines()]
    assert [(row["check"], row["result"]) for row in checks] == [("memcheck", "passed"), ("norm modules", "passed")]
    assert "LayerNorm forward + backward" in done.stdout
    assert done.stdout.splitlines()[-1].split()[:3] == ["norm", "modules", "passed"]
