# SPDX-License-Identifier: Apache-2.0
"""A value of a type that its key does not take: one sentence with the types and choices that it takes."""

import ast
import re
from collections.abc import Iterator

from lightning_optkit._near_names import near_names

__all__ = ["about_value"]

_ONE = re.compile(r"Expected a (?P<kind><class '[\w.]+'>|typing\.Literal\[.*\])\. Got value: (?P<value>.*)", re.DOTALL)
_ENTRY = re.compile(r"- Not a valid subclass of (?P<kind>\w+)\. Got value: (?P<value>.*)")
_AS_IN_YAML = {"NoneType": ["null"], "bool": ["true", "false"]}
_TYPES = {"int", "float", "str", "null", "Tensor", "timedelta"}


def about_value(message: str) -> str | None:
    r"""The value, and what is taken; None where a class is meant, of whose name or arguments there is more to say.

    Args:
        message: Of jsonargparse, without the line that has the key.

    Example:
        >>> about_value("Expected a <class 'bool'>. Got value: maybe")
        'maybe is none of true, false.'
        >>> about_value("Subtypes: [typing.Literal['warn'], <class 'bool'>]\nErrors:\nGiven value: wran")
        'wran is none of warn, true, false. Near it: warn.'
    """
    lines = [line.strip() for line in message.strip().splitlines()] or [""]
    of_entries = [found for line in lines if (found := _ENTRY.fullmatch(line)) and "class_path" not in found["value"]]
    if len(of_entries) == 1:
        return _sentence(of_entries[0]["value"], [f"<class '{of_entries[0]['kind']}'>"])
    if "class_path" in lines[-1] or any("Problem with given class_path" in line for line in lines):
        return None
    if found := _ONE.fullmatch("\n".join(lines)):
        return _sentence(found["value"], [found["kind"]])
    after = {
        name: line.removeprefix(name) for line in lines for name in ("Subtypes: ", "Given value: ") if name in line
    }
    if len(after) < 2 or "Given value type: <class 'dict'>" in lines:
        return None
    kinds, value = [*_split(after["Subtypes: "][1:-1])], after["Given value: "]
    is_name = re.fullmatch(r"[A-Za-z_][\w.]*", value) is not None
    return None if is_name and any(_is_class(each) for each in kinds) else _sentence(value, kinds)


def _sentence(value: str, kinds: list[str]) -> str:
    names = [*dict.fromkeys(each for kind in kinds for each in _taken(kind))]  # some stand as numbers and as text
    near = near_names(value, [each for each in names if each not in _TYPES])
    said = f"{value} is no {names[0]}" if len(names) == 1 else f"{value} is none of {', '.join(names)}"
    if all(_is_class(each) for each in kinds):
        return f"{said}; name a class, as in {{class_path: {names[0] if len(names) > 1 else f'my_file.My{names[0]}'}}}."
    return f"{said}. Near it: {', '.join(near)}." if near else f"{said}."


def _taken(kind: str) -> Iterator[str]:
    """As it is written in a file."""
    if found := re.fullmatch(r"typing\.Literal(\[.*\])", kind):
        for each in ast.literal_eval(found[1]):
            yield "null" if each is None else str(each).lower() if isinstance(each, bool) else str(each)
    elif found := re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>", kind):
        yield from _AS_IN_YAML.get(found[1], [found[1]])
    else:
        yield re.sub(r"\b(?:\w+\.)+", "", kind)


def _is_class(kind: str) -> bool:
    """Whether a class is named there, or a list of such."""
    if kind.startswith("typing.Literal"):
        return False
    return any(re.match(r"(?:list|Iterable)\[|[A-Z]", each) and each not in _TYPES for each in _taken(kind))


def _split(kinds: str) -> Iterator[str]:
    """At the commas that are in no bracket."""
    depth, start = 0, 0
    for place, each in enumerate(kinds):
        depth += (each == "[") - (each == "]")
        if each == "," and not depth:
            yield kinds[start:place].strip()
            start = place + 1
    yield kinds[start:].strip()
