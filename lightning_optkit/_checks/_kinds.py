# SPDX-License-Identifier: Apache-2.0
"""Arguments that are neither numbers nor tensors: flags, choices, names, functions, objects, files, saved states."""

import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_optkit._checks._numbers import NO_LIST
from lightning_optkit._checks._shown import shown

__all__ = [
    "check_bools",
    "check_callable",
    "check_instance",
    "check_like",
    "check_listed",
    "check_mapping",
    "check_one_of",
    "check_path",
    "check_pattern",
    "check_state",
    "check_text",
    "iterate",
]


def check_one_of(owner: str, name: str, value: object, choices: Iterable[object]) -> None:
    """Passes if `value` is one of `choices`.

    Raises:
        ValueError: naming the choices, if it is not.

    Example:
        >>> check_one_of("AdamW", "rounding", "nearest", ("nearest", "stochastic"))
    """
    choices = tuple(choices)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{owner}({name}={shown(value)}): {name} must be one of {allowed}.")


def check_bools(owner: str, **values: object) -> None:
    """Passes if each of `values` is True or False.

    Raises:
        ValueError: naming the first that is not.

    Example:
        >>> check_bools("Fuse", verbose=True, norms=False)
    """
    for name, value in values.items():
        check_one_of(owner, name, value, (False, True))


def check_text(owner: str, name: str, value: str, such_as: str, *, expression: bool = False) -> str:
    """Returns `value` if it is a string that is not empty.

    Args:
        owner: Whose argument it is.
        name: Of the argument.
        value: To be checked.
        such_as: What the string is, with an example: 'a metric, such as "val_loss"'.
        expression: Whether it must be a regular expression.

    Raises:
        TypeError: if it is not a string.
        ValueError: if it is empty, or no regular expression where one is needed.

    Example:
        >>> check_text("PlateauSchedule", "monitor", "val_loss", 'a metric, such as "val_loss"')
        'val_loss'
    """
    if not isinstance(value, str) or not value:
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{owner}({name}={shown(value)}): {name} must be {such_as}.")
    if expression:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{owner}({name}={shown(value)}): {name} must be {such_as}, but has {error}.") from None
    return value


def check_pattern(owner: str, name: str, value: str) -> str:
    """Returns `value` if it can be a shell pattern of names.

    Raises:
        TypeError: if it is not a string.
        ValueError: if it is empty.

    Example:
        >>> check_pattern("MaxNorm", "names", "head.*")
        'head.*'
    """
    return check_text(owner, name, value, 'a shell pattern of names, such as "blocks.*"')


def check_callable(
    owner: str, name: str, value: Callable[..., Any], call: str, *, classes: bool = False
) -> Callable[..., Any]:
    """Returns `value` if it can be called as `call` says, with as many arguments.

    Args:
        owner: Whose argument it is.
        name: Of the argument.
        value: To be checked.
        call: How it will be called: "forward(model, batch)".
        classes: Whether a class will do, as `list` does for a tokenizer.

    Raises:
        TypeError: if it is not callable, takes other arguments, or is a class where a function is wanted.

    Example:
        >>> check_callable("Vocabulary", "tokenize", str.split, "tokenize(text)")("a b")
        ['a', 'b']
    """
    if callable(value) and (classes or not isinstance(value, type)):
        try:
            arguments = [name for name in call.partition("(")[2].rstrip(")").split(",") if name]
            inspect.signature(value).bind(*arguments)
            return value
        except ValueError:  # a function in C that does not say what it takes
            return value
        except TypeError:
            pass
    raise TypeError(f"{owner}({name}={shown(value)}): {name} must be a function, called as {call}.")


def check_instance(owner: str, name: str, value: Any, kind: type | tuple[type, ...], such_as: str) -> Any:
    """Returns `value` if it is an object of `kind`, and not a class.

    Args:
        owner: Whose argument it is.
        name: Of the argument.
        value: To be checked.
        kind: The classes that will do.
        such_as: What it must be, with an example: "a clip such as ClipNorm(1.0)".

    Raises:
        TypeError: if it is something else.

    Example:
        >>> check_instance("join", "a", "cosine", str, 'a name such as "cosine"')
        'cosine'
    """
    if isinstance(value, type) or not isinstance(value, kind):
        raise TypeError(f"{owner}({name}={shown(value)}): {name} must be {such_as}.")
    return value


def check_like(owner: str, name: str, value: object, attributes: Iterable[str], such_as: str) -> None:
    """Passes if `value` is an object, not a class, that has all of `attributes`.

    Raises:
        TypeError: if it is not.

    Example:
        >>> check_like("Owner", "path", Path("a"), ("stem", "suffix"), 'a path such as Path("a")')
    """
    if isinstance(value, type) or not all(hasattr(value, attribute) for attribute in attributes):
        raise TypeError(f"{owner}({name}={shown(value)}): {name} must be {such_as}.")


def check_listed(
    owner: str, name: str, values: Any, such_as: str, *, empty: bool = False, member: str = ""
) -> list[Any]:
    """Returns `values` as a list, read once. A string, a tensor or a mapping is no list of things.

    Args:
        owner: Whose argument it is.
        name: Of the argument.
        values: To be checked.
        such_as: What they must be, in the plural or with an example: 'a list of files, such as ["a.ckpt"]'.
        empty: Whether there may be none.
        member: What one of them is called: " parameter".

    Raises:
        TypeError: if they cannot be iterated over.
        ValueError: if there are none.

    Example:
        >>> check_listed("average_checkpoints", "checkpoints", iter(["a.ckpt"]), 'a list of files, such as ["a.ckpt"]')
        ['a.ckpt']
    """
    try:
        if isinstance(values, (*NO_LIST, Tensor, Mapping, type)):
            raise TypeError
        listed = list(values)
    except Exception as error:
        raised = type(error).__name__ if hasattr(type(values), "__iter__") and error.args else ""
        reason = f"; reading it raised {raised}: {shown(str(error))}" if raised else ""
        raise TypeError(f"{owner}({name}={shown(values)}): {name} must be {such_as}{reason}.") from error
    if not listed and not empty:
        raise ValueError(f"{owner}({name}=[]): {name} must hold at least one{member}.")
    return listed


def iterate(owner: str, name: str, values: Iterable[Any], such_as: str) -> Iterator[Any]:
    """An iterator over `values`, which may be too many for a list.

    Raises:
        TypeError: if they cannot be iterated over. A string, a tensor or a mapping is no list of things.

    Example:
        >>> next(iterate("Standardize.fit", "batches", [1, 2], "a list of batches"))
        1
    """
    try:
        if isinstance(values, (*NO_LIST, Tensor, Mapping, type)):
            raise TypeError
        return iter(values)
    except Exception as error:
        raise TypeError(f"{owner}({name}={shown(values)}): {name} must be {such_as}.") from error


def check_mapping(owner: str, name: str, value: Any, such_as: str) -> dict[str, Any]:
    """Returns `value` as a dict, if it is a mapping whose keys are strings.

    Raises:
        TypeError: if it is not.

    Example:
        >>> check_mapping("ParameterGroups", "overrides", {"head.*": {"lr": 0.1}}, 'a dict such as {"head.*": {}}')
        {'head.*': {'lr': 0.1}}
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{owner}({name}={shown(value)}): {name} must be {such_as}.")
    return dict(value)


def check_path(owner: str, name: str, value: str | os.PathLike[str], *, exists: bool = False) -> Path:
    """Returns `value` as a path.

    Args:
        owner: Whose argument it is.
        name: Of the argument.
        value: To be checked.
        exists: Whether there must be a file.

    Raises:
        TypeError: if it is neither a string nor a path.
        ValueError: if no file can be called so.
        FileNotFoundError: if there must be a file and there is none.

    Example:
        >>> check_path("Report", "path", "report.html").name
        'report.html'
    """
    if isinstance(value, type) or not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise TypeError(f'{owner}({name}={shown(value)}): {name} must be a path, such as "folder/file".')
    if not str(value) or "\0" in str(value):
        raise ValueError(f'{owner}({name}={shown(value)}): {name} must be a path, such as "folder/file".')
    path = Path(value)
    if exists and not _is_there(path):
        raise FileNotFoundError(f"{owner}({name}={shown(str(value))}): {name} must be a file, and there is none.")
    return path


def check_state(owner: str, state_dict: Any, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """Returns the saved state, if it is what `owner` has saved: for each name a value of its kind; integers count.

    Args:
        owner: Whose `load_state_dict` it is given to; or of another call the beginning, "Owner.method(argument".
        state_dict: To be checked.
        kinds: What it must hold.

    Raises:
        TypeError: if it is no dict, or a value is of another kind.
        ValueError: if something is missing.

    Example:
        >>> check_state("SnapshotEnsemble", {"paths": []}, paths=list)
        {'paths': []}
    """
    call = owner if "(" in owner else f"{owner}.load_state_dict(state_dict"
    saver = owner.partition(".")[0].partition("(")[0]
    argument = call.partition("(")[2]
    wanted = ", ".join(map(repr, kinds))
    if isinstance(state_dict, type) or not isinstance(state_dict, Mapping):
        raise TypeError(f"{call}={shown(state_dict)}): {argument} must be a dict with {wanted}, as saved by {saver}.")
    for name, kind in kinds.items():
        if name not in state_dict:
            raise ValueError(
                f"{call}={shown(list(state_dict))}): {argument} must hold {wanted}, as saved by {saver}; {name!r} is "
                "missing."
            )
        value = state_dict[name]
        if isinstance(value, int) and not isinstance(value, bool) and kind is not float and not 0 <= value < 2**63:
            raise ValueError(f"{call}[{name!r}]={shown(value)}): {argument} must count {name!r} from 0, below 2**63.")
        kinds_of_one = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds_of_one) or (isinstance(value, bool) and bool not in kinds_of_one):
            raise TypeError(
                f"{call}[{name!r}]={shown(value)}): {argument} must hold {wanted}, as saved by {saver}; {name!r} must "
                f"be {' or '.join(each.__name__ for each in kinds_of_one)}."
            )
    return dict(state_dict)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name longer than the file system takes
        return False
