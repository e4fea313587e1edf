# SPDX-License-Identifier: Apache-2.0
"""Reads the docstrings of the package as the site needs them; mkdocstrings loads this file."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """`Example:` becomes the section shown as code, Sphinx's formulas become code, a name has its file's source."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Rewrites the docstring of one object, if it has one."""
        if obj.docstring is None:
            return
        text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
        if obj.parent is not None and obj.parent.is_module and "Source:" not in text and _is_named_by_file(obj):
            about = obj.parent.docstring.value if obj.parent.docstring else ""
            text = "\n\n".join([text, *re.findall(r"^Source.*?(?=\n\n|\Z)", about, flags=re.M | re.S)])
        obj.docstring.value = re.sub(r":math:`([^`]+)`", r"`\1`", text)


def _is_named_by_file(obj: Any) -> bool:
    return bool(obj.name.lower() == obj.parent.name.replace("_", ""))
