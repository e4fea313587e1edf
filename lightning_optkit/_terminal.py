# SPDX-License-Identifier: Apache-2.0
"""The width of the terminal, text that fits it, and what is said to somebody who waits at one."""

import shutil
import sys
import textwrap
from typing import Any

__all__ = ["announce", "fitted", "width"]

_MOST, _LEAST = 80, 20


def width() -> int:
    """Columns of the terminal, at most 80; 80 if the output goes into a file. `COLUMNS` in the environment decides."""
    return min(max(shutil.get_terminal_size((_MOST, 24)).columns, _LEAST), _MOST)


def fitted(text: str, columns: int | None = None) -> str:
    """The text with lines of at most so many columns, where a word allows it; what is wrapped is indented.

    Args:
        text: Some lines.
        columns: Default: those of a terminal below 80; a file, or a wider terminal, gets the lines as they are.

    Example:
        >>> print(fitted("  two three four", 12))
          two three
            four
    """
    if columns is None and width() == _MOST:
        return text
    columns = width() if columns is None else columns
    return "\n".join(part for line in text.split("\n") for part in _wrapped(line, columns))


def announce(sentence: str) -> None:
    """Says what takes its time now, on the standard error if that is a terminal: a file has the answer alone.

    Args:
        sentence: One line.
    """
    if sys.stderr.isatty():
        print(sentence, file=sys.stderr, flush=True)


def _wrapped(line: str, columns: int) -> list[str]:
    if len(line) <= columns:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()))
    looks: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(line.strip(), columns, initial_indent=indent, subsequent_indent=f"{indent}  ", **looks)
