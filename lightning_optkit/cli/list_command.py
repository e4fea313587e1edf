# SPDX-License-Identifier: Apache-2.0
"""`optkit list`: the public classes and functions, and what their docstrings say."""

import inspect
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, Namespace
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from lightning_optkit.cli.docstring_text import in_words, signature_text, wrapped

__all__ = ["Entry", "add_options", "entries", "list"]

FOLDERS = {
    "callbacks": "Callbacks: one per strategy, for a Trainer",
    "optimizers": "Update rules",
    "clipping": "Clips, for GradientClipping or clip=",
    "averaging": "Averages, for WeightAveraging or average=",
    "schedules": "Schedules, for LRSchedule and HyperparameterSchedule",
    "init": "Initialization, for Initialize",
    "data": "Data, for Preprocess and Augment",
    "regularization": "Regularization, as functions",
    "layers": "Layers",
}

_FOR_SUMMARY = 40  # columns, below which a sentence beside the longest name is a strip of single words


class Entry(NamedTuple):
    """One public name."""

    folder: str
    name: str  # as after `import lightning_optkit as ok`
    summary: str  # first sentence of its docstring
    text: str  # the whole docstring
    value: Any


def entries() -> "tuple[Entry, ...]":
    """Every public strategy, by folder and name."""
    found = []
    for folder in FOLDERS:
        module = import_module(f"lightning_optkit.{folder}")
        for name in sorted(module.__all__, key=str.lower):
            value: Any = getattr(module, name)
            if not (inspect.isclass(value) or inspect.isfunction(value)):  # a type alias
                continue
            text = inspect.getdoc(value) or ""
            path = f"ok.{name}" if inspect.isclass(value) else f"ok.{folder}.{name}"
            summary = in_words(text.partition("\n\n")[0].replace("\n", " "))
            found.append(Entry(folder, path, summary, text, value))
    return tuple(found)


def _with(words: Sequence[str], some: Iterable[Entry], *, anywhere: bool) -> "tuple[Entry, ...]":
    """Those with all words in their name or first sentence, or anywhere in their docstring."""
    text_of = {entry: f"{entry.name} {in_words(entry.text) if anywhere else entry.summary}".lower() for entry in some}
    return tuple(entry for entry, text in text_of.items() if all(word.lower() in text for word in words))


def add_options(parser: ArgumentParser) -> None:
    """The words stand by themselves."""
    of_words = "all of them must occur, in whatever case; without one: everything"
    parser.add_argument("words", nargs="*", type=str, default=[], help=of_words)
    parser.add_argument("--of", choices=[*FOLDERS], help="only one kind")
    parser.add_argument("--anywhere", action="store_true", help="with the words anywhere in the description")


def list(options: Namespace) -> None:
    """Lists every strategy, or those with some words in their name or description.

    `optkit list sharpness` finds by words in names and first sentences, and where none has them, or with --anywhere, in
    whole descriptions. `optkit list SAM` shows all there is to say of one class or function: its signature, arguments,
    ranges, errors, source.

    Raises:
        ValueError: if nothing has these words.
    """
    words, of = options.words, options.of
    all_of = [entry for entry in entries() if of in (None, entry.folder)]
    console = Console(highlight=False, markup=False)
    named = [entry for entry in all_of if len(words) == 1 and entry.name.rpartition(".")[2] == words[0]]
    if len(named) == 1:
        name, text = named[0].name, wrapped(named[0].text, console.width)
        console.print(signature_text(name, named[0].value, console.width), style="bold", soft_wrap=True)
        console.print(f"\n{text}", soft_wrap=True)  # an example's lines stay whole
        return
    anywhere = _with(words, all_of, anywhere=True)
    found = anywhere if options.anywhere else _with(words, all_of, anywhere=False) or anywhere
    if not found:
        by_lower = {(name := entry.name.rpartition(".")[2]).lower(): name for entry in all_of}
        near = [by_lower[name] for word in words for name in get_close_matches(word.lower(), by_lower, cutoff=0.7)]
        hint = f" Near it: {', '.join(near)}." if near else ""
        raise ValueError(
            f"optkit list {' '.join(words)}: nothing has these words; `optkit list` shows everything.{hint}"
        )
    for folder, title in FOLDERS.items():
        rows = [entry for entry in found if entry.folder == folder]
        if rows and console.width - max(len(entry.name) for entry in rows) < _FOR_SUMMARY:
            console.print(f"{title}\n", style="bold")
            for entry in rows:
                console.print(entry.name, Padding(entry.summary, (0, 0, 1, 4)))
        elif rows:
            table = Table(box=box.SIMPLE, show_header=False, title=title, title_justify="left", title_style="bold")
            table.add_column(no_wrap=True)
            table.add_column(overflow="fold")
            for entry in rows:
                table.add_row(entry.name, entry.summary)
            console.print(table)
    rest = len(anywhere) - len(found)
    more = f", {rest} more with --anywhere" if rest else ""
    console.print(f"{len(found)} found{more}.\nSources and costs: docs/strategies.md. One in full: optkit list NAME.")
