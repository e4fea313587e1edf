# SPDX-License-Identifier: Apache-2.0
"""The notebooks of the chapter hold what its pages hold, whose code test_textbook.py runs; links lead somewhere."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "chapter_notebook.py"
spec = importlib.util.spec_from_file_location("chapter_notebook", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.mark.parametrize(("page", "name"), script.NOTEBOOKS.items())
def test_a_notebook_is_its_page(page, name):
    text = (ROOT / "docs" / page).read_text()
    written = (ROOT / "examples" / name).read_text()
    assert written == script.notebook(text), "run python examples/chapter_notebook.py"
    cells = json.loads(written)["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code == [block.rstrip("\n") for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)]
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert re.findall(r"^#+ .*", prose, flags=re.M) == re.findall(
        r"^#+ .*", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M
    )
    for target in re.findall(r"\]\(([^)#]+)", prose):
        assert (ROOT / "examples" / target).exists(), target
