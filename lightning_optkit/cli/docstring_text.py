# SPDX-License-Identifier: Apache-2.0
"""A docstring as a terminal shows it: paragraphs as wide as there is room, formulas in words, the signature above."""

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

__all__ = ["in_words", "signature_text", "wrapped"]

_SYMBOLS = {  # whose names say less than a sign
    "leftarrow": "<-", "rightarrow": "->", "to": "->", "le": "<=", "leq": "<=", "ge": ">=", "geq": ">=", "ne": "!=",
    "neq": "!=", "sim": "~", "approx": "~", "cdot": "*", "times": "*", "pm": "+-", "dots": "...", "ldots": "...",
    "cdots": "...", "odot": "*",
}  # fmt: skip
_NAMES = {"|": "||", "langle": "<", "rangle": ">", "infty": "inf", "varepsilon": "epsilon", "partial": "d"}
_DROPPED = {
    "big",
    "Big",
    "bigl",
    "bigr",
    "left",
    "right",
    "mathrm",
    "operatorname",
    "text",
    "mathbf",
    "mathcal",
    "bigg",
}
_GROUP = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
_ITEM = re.compile(r"(?:-|\*|\d+\.) ")
_COLUMNS = re.compile(r"\S {3,}\S|^=+( +=+)+$")  # of a table
_ENTRIES = ("Args:", "Raises:", "Attributes:")  # each line at their indentation begins a new one
_SECTIONS = (*_ENTRIES, "Returns:", "Yields:", "Example:", "Examples:")


def in_words(text: str) -> str:
    r"""Formulas of `:math:` as they would be typed.

    Example:
        >>> in_words(r"variance :math:`\eta / (1 + t)^\gamma` of each")
        'variance eta / (1 + t)^gamma of each'
    """
    return re.sub(r":math:`([^`]*)`", lambda found: _formula(found[1]), text)


def _formula(latex: str) -> str:
    said = re.sub(r"\\q?quad|\\[,;! ]|\s+", " ", latex)
    for _ in range(4):  # one level of nesting each
        said = re.sub(rf"\\t?frac{_GROUP}{_GROUP}", lambda found: f"{_operand(found[1])} / {_operand(found[2])} ", said)
        said = re.sub(rf"\\sqrt{_GROUP}", r"sqrt(\1)", said)
        said = re.sub(rf"\\(?:mathrm|operatorname|text|mathbf|mathcal){_GROUP}", r"\1", said)
    said = re.sub(r"\\(hat|bar|tilde)\s*", r"\1_", said)
    said = said.replace(r"\_", "_").replace(r"\{", "(").replace(r"\}", ")")
    said = re.sub(r"\\([A-Za-z]+|\|)", _named, said)
    said = re.sub(rf"([_^]){_GROUP}", lambda found: found[1] + _operand(found[2]), said)
    return re.sub(r"\s+([,)])", r"\1", " ".join(said.replace("{", "").replace("}", "").split()))


def _operand(part: str) -> str:
    return part if re.fullmatch(r"-?\\?[\w.]+|\(.*\)", part) else f"({part})"


def _named(found: re.Match[str]) -> str:
    r"""The name of `\eta`, apart from a letter or number before it."""
    name, before = found[1], found.string[max(found.start() - 1, 0) : found.start()]
    if name in _DROPPED:
        return ""
    if name in _SYMBOLS:
        return f" {_SYMBOLS[name]} "
    said = _NAMES.get(name, name)
    return f" {said}" if before.isalnum() and said[0].isalpha() else said


def wrapped(text: str, width: int) -> str:
    """The lines of a paragraph, of an entry of `Args` or of a list together, broken anew.

    Examples, tables and literal blocks keep their lines.

    Args:
        text: A docstring, without its common indentation.
        width: Columns, at least 20.
    """
    return _Lines(max(width, 20)).of(text)


class _Lines:
    def __init__(self, width: int) -> None:
        self._width = width
        self._done: list[str] = []
        self._words: list[str] = []  # of the paragraph so far
        self._first = self._after = self._base = 0  # indentation of its first line, of the others, of the section
        self._is_item = self._is_verbatim = False
        self._section = ""

    def of(self, text: str) -> str:
        for line in re.sub(r"(?m)^( *)\.\. math:: (.*(?:\n\1 +\S.*)*)", _displayed, in_words(text)).splitlines():
            self._take(line.rstrip())
        self._end()
        return "\n".join(self._done)

    def _take(self, line: str) -> None:
        indent, said = len(line) - len(line.lstrip()), line.strip()
        if not said:
            self._end()
            self._is_verbatim = False
            self._done.append("")
        elif self._is_verbatim or said.startswith((">>>", "|")) or _COLUMNS.search(said):
            self._end()
            self._is_verbatim = said.startswith(">>>") or self._is_verbatim
            self._done.append(line)
        elif said in _SECTIONS and indent == 0:
            self._end()
            self._section, self._base = said, 4
            self._done.append(line)
        elif self._continues(indent, said):
            self._words.append(said)
        else:
            self._end()
            marker = _ITEM.match(said)
            is_entry = self._section in _ENTRIES and indent == self._base
            self._first, self._is_item = indent, marker is not None or is_entry
            self._after = indent + (marker.end() if marker else 4 if is_entry else 0)
            self._words = [said]

    def _continues(self, indent: int, said: str) -> bool:
        if not self._words or _ITEM.match(said):
            return False
        return indent > self._first if self._is_item else indent == self._first

    def _end(self) -> None:
        if self._words:
            self._done += textwrap.wrap(
                " ".join(self._words),
                self._width,
                initial_indent=" " * self._first,
                subsequent_indent=" " * self._after,
                break_long_words=False,
                break_on_hyphens=False,
            )
        self._words = []


def _displayed(found: re.Match[str]) -> str:
    """A formula that stands alone, in one line."""
    return f"{found[1]}    {_formula(found[2])}"


def signature_text(name: str, value: Callable[..., Any], width: int) -> str:
    """Its arguments with types and defaults, in one line or in one each.

    Args:
        name: What is called.
        value: A class or a function.
        width: Columns, at least 20.
    """
    signature = inspect.signature(value)
    parts: list[str] = []
    before: inspect.Parameter | None = None
    for parameter in signature.parameters.values():
        is_keyword = parameter.kind is parameter.KEYWORD_ONLY
        if is_keyword and (before is None or before.kind in (before.POSITIONAL_ONLY, before.POSITIONAL_OR_KEYWORD)):
            parts.append("*")
        parts.append(_parameter_text(parameter))
        before = parameter
    returned = signature.return_annotation
    gives = "" if inspect.isclass(value) or returned is signature.empty else f" -> {_type_text(returned)}"
    line = f"{name}({', '.join(parts)}){gives}"
    if len(line) <= width:
        return line
    return "\n".join([f"{name}(", *(_broken(f"{part},", width) for part in parts), f"){gives}"])


def _broken(part: str, width: int) -> str:
    return textwrap.fill(
        part, max(width, 20), initial_indent="    ", subsequent_indent=" " * 8, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _parameter_text(parameter: inspect.Parameter) -> str:
    star = (
        "*" if parameter.kind is parameter.VAR_POSITIONAL else "**" if parameter.kind is parameter.VAR_KEYWORD else ""
    )
    has_type, has_default = (each is not parameter.empty for each in (parameter.annotation, parameter.default))
    said = f"{star}{parameter.name}" + (f": {_type_text(parameter.annotation)}" if has_type else "")
    if not has_default:
        return said
    default = parameter.default
    shown = default.__name__ if inspect.isfunction(default) or inspect.isclass(default) else repr(default)
    return f"{said} = {shown}" if has_type else f"{said}={shown}"


def _type_text(annotation: Any) -> str:
    """Without modules."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", text)
