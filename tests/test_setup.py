# SPDX-License-Identifier: Apache-2.0
"""What building asks of an environment: a sentence for what is too old, and nothing that it can do without."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REQUIRES = re.search(r"^requires = .*", (ROOT / "pyproject.toml").read_text(), flags=re.M)[0]
SETUPTOOLS = int(re.search(r'"setuptools>=(\d+)"', REQUIRES)[1])
TORCH = re.search(r'"torch>=(\d+)\.(\d+)"', REQUIRES)
BEFORE = f"{TORCH[1]}.{int(TORCH[2]) - 1}.1"


@pytest.fixture
def setup_py(tmp_path):
    """Runs setup.py with a setuptools of some version that builds nothing, then some code with what it defines."""
    (tmp_path / "setuptools" / "command").mkdir(parents=True)
    (tmp_path / "setuptools" / "command" / "build_ext.py").write_text("class build_ext: pass\n")

    def run(version, code=""):
        stub = f"__version__ = {version!r}\ndef Extension(*_, **__): pass\ndef setup(**_): print('built')\n"
        (tmp_path / "setuptools" / "__init__.py").write_text(stub)
        lines = ["import runpy, sys", f"sys.path.insert(0, {str(tmp_path)!r})"]
        lines += [f"names = runpy.run_path({str(ROOT / 'setup.py')!r})", code]
        words = [sys.executable, "-c", "\n".join(lines)]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=tmp_path)

    return run


@pytest.mark.parametrize("version", ["65.5.0", f"{SETUPTOOLS - 1}.3.0", "9"])
def test_a_setuptools_that_is_too_old_is_named_with_the_command_that_replaces_it(setup_py, version):
    done = setup_py(version)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        f"lightning_optkit: building needs setuptools >= {SETUPTOOLS}, and this is {version}: "
        f"pip install 'setuptools>={SETUPTOOLS}', then install again.\n"
    )


@pytest.mark.parametrize("version", [str(SETUPTOOLS), f"{SETUPTOOLS}.0.1", "100.0", f"{SETUPTOOLS + 1}.0.post2026"])
def test_one_that_is_new_enough_builds(setup_py, version):
    done = setup_py(version)
    assert (done.returncode, done.stdout) == (0, "built\n"), done.stderr


@pytest.mark.parametrize(
    ("version", "is_enough"), [(BEFORE, False), ("1.99", False), (f"{TORCH[1]}.{TORCH[2]}.0", True)]
)
def test_the_torch_that_it_builds_with_is_compared_too(setup_py, tmp_path, version, is_enough):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}+cpu'\n")
    done = setup_py("100", "print(names['torch_folder']())")
    assert (done.returncode == 0) == is_enough
    least = f"{TORCH[1]}.{TORCH[2]}"
    said = f"building needs torch >= {least}, and this is {version}: pip install 'torch>={least}', then install again."
    assert (said in done.stderr) == (not is_enough)


def test_neither_pybind11_nor_ninja_is_needed(setup_py):
    code = (
        "sys.modules['pybind11'] = None\n"
        "folder = names['Path'](names['pybind11_include'](names['torch_folder']()))\n"
        "assert (folder / 'pybind11' / 'pybind11.h').exists()\n"
        "names['run_jobs'].__globals__['ninja_program'] = lambda: ''\n"
        "Job, here = names['Job'], names['Path']()\n"
        "names['run_jobs']([Job('b', 'cp a b', ['a'], False), Job('a', 'echo 1 > a', [], True)], here)\n"
        "print((here / 'b').read_text())"
    )
    done = setup_py("100", code)
    assert done.stdout.split() == ["built", "1"], done.stderr


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_line_to_copy_installs_what_the_build_needs(page):
    (line,) = re.findall(
        r"^pip install (.*) && pip install --no-build-isolation \.", (ROOT / page).read_text(), flags=re.M
    )
    assert line.split() == ["torch", f'"setuptools>={SETUPTOOLS}"']
