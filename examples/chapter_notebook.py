# SPDX-License-Identifier: Apache-2.0
"""Writes examples/chapter.ipynb and chapter.zh.ipynb: docs/textbook.md and its Chinese page, to be run cell by cell.

python examples/chapter_notebook.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {"textbook.md": "chapter.ipynb", "textbook.zh.md": "chapter.zh.ipynb"}


def cells(page: str) -> list[dict[str, Any]]:
    """The sections and the code of a page, in order; links lead from examples/ to docs/."""
    found: list[dict[str, Any]] = []
    for part in re.split(r"(^```python\n.*?^```\n?)", page, flags=re.M | re.S):
        if part.startswith("```python"):
            code = part.removeprefix("```python\n").rstrip("`\n")
            found.append({"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": code})
        else:
            text = re.sub(r"\]\((?!http|#)", "](../docs/", part).strip()
            found += [
                {"cell_type": "markdown", "metadata": {}, "source": section.strip()}
                for section in re.split(r"^(?=## )", text, flags=re.M)
                if section.strip()
            ]
    for number, cell in enumerate(found):
        cell["id"] = f"cell-{number}"
        cell["source"] = cell["source"].splitlines(keepends=True)
    return found


def notebook(page: str) -> str:
    """The file of a page."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    content = {"cells": cells(page), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Writes both."""
    for page, name in NOTEBOOKS.items():
        (ROOT / "examples" / name).write_text(notebook((ROOT / "docs" / page).read_text()))


if __name__ == "__main__":
    main()
