# SPDX-License-Identifier: Apache-2.0
"""A value that the parser takes and its class refuses: the sentence of the class, with the key of the file."""

import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
import lightning
import lightning.pytorch as pl
import lightning.pytorch.cli
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optkit.cli.given_checkpoint import about_checkpoint
from lightning_optkit.cli.refused_optimizers import about_optimizer
from lightning_optkit.cli.users_folders import is_of_user
from lightning_optkit.cli.wrong_modules import first_errors
from lightning_optkit.cli.wrong_names import our_sentence_in

__all__ = ["CLIWithKeys", "RefusedValue", "about_settings", "keys_named", "with_line"]

_PACKAGE = str(Path(__file__).parents[1])
_LIGHTNING = str(Path(lightning.__file__).parent)
_NO_LOADER = re.compile(r"`\w+_dataloader` must be implemented")
_WITHOUT_DATA = ". The file can name the data, as in data: {class_path: my_file.MyData}."
_PARSER = str(Path(jsonargparse.__file__).parent)
_PARSERS = (_PARSER, lightning.pytorch.cli.__file__)
_EQUAL = re.compile(r"Found more than one stateful callback of type `(?P<owner>\w+)`")
_TWICE = re.compile(r"(?P<owner>\w+)\(.*\): (?:the same object is )?given twice", flags=re.S)
_OF_VALUE = re.compile(r"(?P<owner>\w+)\((?P<argument>\w+)(?P<entry>\[.*?\])?=(?P<value>.*?)\): ", flags=re.S)


class RefusedValue(ValueError):
    """The key of a configuration, and why its value is refused."""


class CLIWithKeys(LightningCLI):
    """Names the key of a value that a class refuses, when it is built or when the run uses it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with keys_named(self):
            super().__init__(*args, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Keeps what a module raises that cannot be imported."""
        with first_errors():
            super().parse_arguments(parser, args)

    def instantiate_classes(self) -> None:
        """Says whose optimizer counts; Lightning's warning would name the class of this object."""
        warnings.filterwarnings("ignore", message=r"`\w+\.configure_optimizers` will be overridden by `\w+")
        super().instantiate_classes()
        own = type(self.model)
        is_replaced = "configure_optimizers" in vars(self.model)
        if is_replaced and own.configure_optimizers is not pl.LightningModule.configure_optimizers:
            rank_zero_warn(
                f"optimizer: that of the configuration takes the place of {own.__name__}.configure_optimizers."
            )


@contextmanager
def keys_named(cli: LightningCLI) -> Iterator[None]:
    """Within it, the refusal of a value of its configuration is a `RefusedValue`.

    Args:
        cli: Its configuration is asked when something is refused.
    """
    try:
        yield
    except RefusedValue:
        raise
    except Exception as error:
        config = getattr(cli, "config", None)
        of_run = {} if config is None else config.get(config.get("subcommand") or "", config)
        sentence, key = about_settings(error), None
        if said := about_optimizer(error, of_run, sentence):
            raise RefusedValue(said) from error
        if sentence is None and isinstance(error, ValueError | TypeError | RuntimeError) and _is_of_trainer(error):
            sentence = str(error)  # of Lightning, as the others, but of no class of its own
        if sentence is not None:
            key = _key_of(sentence, [*_built(of_run, "")], _class_that_failed(error))
        if key is None and sentence is not None and _is_of_trainer(error):
            key = "trainer"
        if key is None:
            raise
        raise RefusedValue(f"{key}: {sentence}") from error


def about_settings(error: BaseException) -> str | None:
    """The sentence that says what to change: of our own code, or of Lightning about its configuration.

    None for an error in the user's module or data, which needs its traceback, also where it followed a refusal that the
    user's code had caught.
    """
    for each in _wrapped(error):
        innermost = traceback.extract_tb(each.__traceback__)[-1]
        is_said = isinstance(each, ValueError | TypeError) or (innermost.line or "").startswith("raise ")
        is_ours = innermost.filename.startswith(_PACKAGE) and is_said
        is_checkpoint = isinstance(each, FileNotFoundError) and innermost.filename.startswith(_LIGHTNING)
        if is_ours or is_checkpoint or isinstance(each, MisconfigurationException):
            return str(each) + (_WITHOUT_DATA if _NO_LOADER.search(str(each)) else "")
        if sentence := about_checkpoint(each) or _about_equal(each):
            return sentence
    return our_sentence_in(str(error))


def with_line(sentence: str, error: BaseException) -> str:
    """With the line of the user's code that calls what refuses, if there is one: no key of a file leads to it.

    Args:
        sentence: Of `about_settings`.
        error: What it is about.
    """
    *_, cause = _wrapped(error)
    files = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(cause.__traceback__)]
    outside = [(file, line) for file, line in files if not file.startswith((_PACKAGE, "<"))]  # <: of a dataclass
    if not outside or outside[-1] == files[-1] or not is_of_user(outside[-1][0]):
        return sentence
    return f"{sentence.rstrip('.')} ({Path(outside[-1][0]).name}, line {outside[-1][1]})."


def _wrapped(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it is raised from; jsonargparse wraps what a class raises, not always by `from`."""
    each: BaseException | None = error
    while each is not None:
        frames = traceback.extract_tb(each.__traceback__)
        if frames:  # else it was never raised, as in `raise ... from ValueError()`
            yield each
        is_of_parser = bool(frames) and frames[-1].filename.startswith(_PARSERS)
        each = each.__cause__ or (each.__context__ if is_of_parser else None)


class _Built(NamedTuple):
    """A class or function of a configuration."""

    key: str
    name: str
    arguments: Mapping[str, Any]


def _key_of(sentence: str, built: list[_Built], failed: str | None) -> str | None:
    """Where the value stands of which the sentence is; None if it is of nothing that the configuration has.

    Args:
        sentence: Of the class.
        built: Everything that the configuration names.
        failed: The class that could not be built, if there is one: the sentences of Lightning do not name it.
    """
    if found := _OF_VALUE.match(sentence):
        of_class = [each for each in built if each.name == found["owner"] and found["argument"] in each.arguments]
        same = [each for each in of_class if _is_shown_as(each.arguments[found["argument"]], found["value"])]
        # Not every value is shown as the file has it: a list may have become a tuple, a name a function.
        if same or len(of_class) == 1:
            return (same or of_class)[0].key
    if found := _TWICE.match(sentence):
        failed = found["owner"]
    return next((each.key for each in built if each.name == failed), None)


def _class_that_failed(error: BaseException) -> str | None:
    """The name of the class that the parser was building."""
    failed = None
    for each in _wrapped(error):
        frames = [frame for frame, _ in traceback.walk_tb(each.__traceback__)]
        for caller, frame in pairwise(frames):
            if caller.f_code.co_filename.startswith(_PARSER) and frame.f_code.co_name == "__init__":
                failed = type(frame.f_locals.get("self")).__name__
    return failed


def _built(value: Any, key: str) -> Iterator[_Built]:
    """What is built of a part of a configuration; keys as in the messages about wrong names."""
    if isinstance(value, list):
        for each in value:
            yield from _built(each, key)
        return
    if not isinstance(value, Namespace | dict):
        return
    entries = vars(value) if isinstance(value, Namespace) else value
    path = entries.get("class_path")
    if not isinstance(path, str):
        for name, each in entries.items():
            yield from _built(each, f"{key}.{name}" if key and not key.endswith(": ") else f"{key}{name}")
        return
    arguments = entries.get("init_args") or {}
    arguments = vars(arguments) if isinstance(arguments, Namespace) else arguments
    yield _Built(key, path.rpartition(".")[2], arguments)
    for name, each in arguments.items():
        yield from _built(each, f"{key}: {path}: {name}")


def _about_equal(error: BaseException) -> str | None:
    """What Lightning says of two callbacks that would save their state under one name, in our words."""
    found = _EQUAL.match(str(error)) if isinstance(error, RuntimeError) else None
    return found and f"{found['owner']}(...): given twice, with nothing that tells their states apart; keep one."


def _is_shown_as(value: Any, shown: str) -> bool:
    try:
        return repr(value) == shown or float(value) == float(shown)
    except (TypeError, ValueError):
        return False


def _is_of_trainer(error: BaseException) -> bool:
    """Whether Lightning's own code refused an argument of the Trainer while that was built."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.name == "instantiate_trainer" for frame in frames) and frames[-1].filename.startswith(_LIGHTNING)
