# SPDX-License-Identifier: Apache-2.0
"""A CUDA library that was compiled with other rules is refused: a step would run another rule by its number."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("cc") or shutil.which("gcc")
LIBRARY = """
struct {{ int version, on_host; void *functions[8]; const char *architectures, *rules; }} api = {{
  {version}, 0, {{0}}, "", "{rules}" }};
void *optkit_cuda_api(void) {{ return &api; }}
"""


def rule_names():
    listed = re.search(r"define OPTKIT_FOR_EACH_RULE\(X\)(.*?)\n\n", (CSRC / "rules" / "all.h").read_text(), re.DOTALL)
    return re.findall(r"X\((\w+),", listed[1])


@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
@pytest.mark.parametrize("change", [None, "one missing", "one more", "another order", "another version"])
def test_refuses_the_rules_of_another_build(change, tmp_path):
    names = rule_names()
    version = int(re.search(r"kCudaApiVersion = (\d+)", (CSRC / "cuda" / "api.h").read_text())[1])
    if change == "one missing":
        del names[3]
    elif change == "one more":
        names.append("yogi")
    elif change == "another order":
        names[2:4] = names[3:1:-1]
    elif change == "another version":
        version += 1
    source, library = tmp_path / "library.c", tmp_path / "library.so"
    source.write_text(LIBRARY.format(version=version, rules="".join(f"{name} " for name in names)))
    subprocess.run([COMPILER, "-shared", "-fPIC", source, "-o", library], check=True)
    program = f"import torch, lightning_optkit._C as extension; extension.open_cuda({str(library)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if change is None:
        assert done.returncode == 0, done.stderr
    else:
        assert f"{library} is of another build of lightning_optkit; install it again." in done.stderr
