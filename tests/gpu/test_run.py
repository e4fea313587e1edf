# SPDX-License-Identifier: Apache-2.0
"""The runner of the GPU tests, by dry runs: with pytest and, as on a bare machine, without it."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_cases import RULES

from lightning_optkit import optimizers
from lightning_optkit._native import extension

FOLDER = Path(__file__).parent
TESTS = ["test_step.py", "test_norms.py", "test_training.py"]
HIDE = "sys.modules['pytest'] = None; "

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")


def run(*arguments, hide=""):
    code = (
        f"import runpy, sys; {hide}sys.argv = {['run.py', *arguments]}; runpy.run_path('run.py', run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("hide", ["", HIDE], ids=["with pytest", "without"])
def test_a_dry_run_passes_skips_what_needs_a_gpu_and_writes_a_row_each(tmp_path, hide):
    rows = tmp_path / "rows.jsonl"
    done = run("test_step.py", "-k", "captured", "--dry-run", "--json", str(rows), hide=hide)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("0 passed, 0 failed, 2 skipped, 0 not run\n")
    assert [json.loads(row)["result"] for row in rows.read_text().splitlines()] == ["skipped"] * 2
    done = run("test_norms.py", "-k", "not_packed", "--dry-run", hide=hide)
    assert done.stdout.endswith("1 passed, 0 failed, 0 skipped, 0 not run\n"), done.stdout + done.stderr


@pytest.mark.skipif(extension is None, reason="no compiled extension")
def test_every_rule_that_is_compiled_for_cuda_is_a_case():
    classes = {cls for cls, _ in RULES.values()}
    param = torch.ones(2, requires_grad=True)
    compiled = {cls([param])._rule({**cls([param]).param_groups[0], **given}).name for cls, given in RULES.values()}
    assert compiled == set(extension.rules()) - {"adafactor"}  # compiled for the CPU alone
    every = {one for one in vars(optimizers).values() if hasattr(one, "_torch_class")}
    in_pytorch = {optimizers.CAME, optimizers.DAdaptAdam, optimizers.Muon, optimizers.SOAP}
    assert every - classes == in_pytorch | {optimizers.Adafactor}


def test_a_failure_is_named_and_fails_the_run():
    done = run("test_norms.py", "-k", "not_packed", hide=HIDE)  # not dry: there is no GPU
    assert done.returncode == 1
    assert "FAILED test_norms::test_rows_that_are_not_packed" in done.stdout
    assert done.stdout.endswith("0 passed, 1 failed, 0 skipped, 0 not run\n")


def test_what_the_time_does_not_do_for_is_not_passed():
    done = run("test_norms.py", "--dry-run", "--minutes", "0")
    assert done.returncode == 1
    assert done.stdout.startswith("0 passed, 0 failed, 0 skipped, ")


@pytest.mark.parametrize("name", TESTS)
def test_the_stand_in_has_all_of_pytest_that_the_tests_use(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    stand_in = importlib.import_module("run").stand_in()
    tree = ast.walk(ast.parse((FOLDER / name).read_text()))
    used = {
        n.attr
        for n in tree
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "pytest"
    }
    assert used and all(hasattr(stand_in, attribute) for attribute in used), used
