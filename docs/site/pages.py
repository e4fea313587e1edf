# SPDX-License-Identifier: Apache-2.0
"""What the site changes in its pages before they are rendered; mkdocs loads this file.

Lines of a Chinese paragraph are joined, since a browser would show a space between them. In the table of strategies the
file of each becomes a link into the API reference.
"""

import ast
import re
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[2] / "lightning_optkit"
_CHINESE = r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"


def on_config(config: Any, **kwargs: Any) -> Any:
    """Anchors keep Chinese characters, as they do where the pages are read on a host of repositories."""
    from pymdownx.slugs import slugify  # not where the tests import this file

    config["mdx_configs"]["toc"]["slugify"] = slugify(case="lower")
    return config


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Leaves blocks of code as they are."""
    if page.file.src_uri.startswith("strategies."):
        markdown = re.sub(r"`(\w+)/(\w+)`", _link, markdown)
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.M | re.S)
    return "".join(
        part if part.startswith("```") else re.sub(rf"(?<={_CHINESE})\n *(?={_CHINESE})", "", part) for part in parts
    )


def _link(cell: re.Match[str]) -> str:
    folder, stem = cell.groups()
    file = _PACKAGE / folder / f"{stem}.py"
    if not file.exists():
        return cell[0]
    defined = re.findall(r"^(?:class|def) (\w+)", file.read_text(), flags=re.M)
    names = [name for name in _exported(file) if name in defined] or _exported(file)
    public = [name for name in names if name in _exported(_PACKAGE / folder / "__init__.py")]
    return f"[{cell[0]}][lightning_optkit.{folder}.{stem}.{(public or names)[0]}]"


def _exported(file: Path) -> list[str]:
    (names,) = re.findall(r"^__all__ = (\[[^]]*\])", file.read_text(), flags=re.M)
    return list(ast.literal_eval(names))
