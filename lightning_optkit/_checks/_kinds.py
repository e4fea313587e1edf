# SPDX-License-Identifier: Apache-2.0
"""Arguments that are neither numbers nor tensors: flags, choices, names, functions, objects, lists."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    "check_pattern",
    "check_text",
    "iterate",
]


def check_one_of(owner: str, name: str, value: object, choices: Iterable[object]) -> None:
    """Raises unless `value` is one of `choices`.

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
    """Raises unless each of `values` is True or False.

    Raises:
        ValueError: naming the first that is not.

    Example:
        >>> check_bools("Fuse", verbose=True, norms=False)
    """
    for name, value in values.items():
        check_one_of(owner, name, value, (False, True))


def check_text(owner: str, name: str, value: str, such_as: str, *, expression: bool = False) -> str:
    """Returns `value` if it is a nonempty string.

    Args:
        owner: Owner of the argument, for the message.
        name: Name of the argument.
        value: The argument.
        such_as: What the string is, with an example: 'a metric, such as "val_loss"'.
        expression: Whether it must be a regular expression.

    Raises:
        TypeError: if it is not a string.
        ValueError: if it is empty, or is not a regular expression although one is required.

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
    """Returns `value` if it can be called with the arguments of `call`.

    Args:
        owner: Owner of the argument, for the message.
        name: Name of the argument.
        value: The argument.
        call: How it will be called: "forward(model, batch)".
        classes: Whether a class is allowed, e.g. `list` as a tokenizer.

    Raises:
        TypeError: if it is not callable, takes other arguments, or is a class where a function is required.

    Example:
        >>> check_callable("Vocabulary", "tokenize", str.split, "tokenize(text)")("a b")
        ['a', 'b']
    """
    if callable(value) and (classes or not isinstance(value, type)):
        try:
            arguments = [name for name in call.partition("(")[2].rstrip(")").split(",") if name]
            inspect.signature(value).bind(*arguments)
            return value
        except ValueError:  # a C function without a signature
            return value
        except TypeError:
            pass
    raise TypeError(f"{owner}({name}={shown(value)}): {name} must be a function, called as {call}.")


def check_instance(owner: str, name: str, value: Any, kind: type | tuple[type, ...], such_as: str) -> Any:
    """Returns `value` if it is an instance of `kind`, not a class.

    Args:
        owner: Owner of the argument, for the message.
        name: Name of the argument.
        value: The argument.
        kind: The allowed classes.
        such_as: What it must be, with an example: "a clip such as ClipNorm(1.0)".

    Raises:
        TypeError: if it is something else.

    Example:
        >>> check_instance("join", "a", "cosine", str, 'a name such as "cosine"')
        'cosine'
    """
    if isinstance(value, type) or not isinstance(value, kind):
        is_uncalled = isinstance(value, type) and issubclass(value, kind)
        raise TypeError(f"{owner}({name}={shown(value)}): {name} must be {such_as}{_uncalled(value, is_uncalled)}.")
    return value


def check_like(owner: str, name: str, value: object, attributes: Iterable[str], such_as: str) -> None:
    """Raises unless `value` is an object, not a class, that has all of `attributes`.

    Raises:
        TypeError: if it is not.

    Example:
        >>> check_like("Owner", "value", 1.5, ("real", "imag"), "a number such as 1.5")
    """
    attributes = tuple(attributes)
    if isinstance(value, type) or not all(hasattr(value, attribute) for attribute in attributes):
        is_uncalled = isinstance(value, type) and all(map({*dir(value), *_fields(value)}.__contains__, attributes))
        raise TypeError(f"{owner}({name}={shown(value)}): {name} must be {such_as}{_uncalled(value, is_uncalled)}.")


def _fields(cls: type) -> set[str]:
    """What an instance has and its class need not: fields of a dataclass, annotations."""
    return {name for base in cls.__mro__ for name in vars(base).get("__annotations__", {})}


def _uncalled(value: Any, is_uncalled: bool) -> str:
    return f"; {value.__name__} is a class, so call it: {value.__name__}(...)" if is_uncalled else ""


def check_listed(
    owner: str, name: str, values: Any, such_as: str, *, empty: bool = False, member: str = ""
) -> list[Any]:
    """Returns `values` as a list, reading it once. Strings, tensors and mappings are refused.

    Args:
        owner: Owner of the argument, for the message.
        name: Name of the argument.
        values: The argument.
        such_as: What they must be, in the plural or with an example: 'a list of files, such as ["a.ckpt"]'.
        empty: Whether an empty list is allowed.
        member: The name of one of them: " parameter".

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
        TypeError: if they cannot be iterated over, or are a string, a tensor or a mapping.

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
    """Returns `value` as a dict, if it is a mapping with string keys.

    Raises:
        TypeError: if it is not.

    Example:
        >>> check_mapping("ParameterGroups", "overrides", {"head.*": {"lr": 0.1}}, 'a dict such as {"head.*": {}}')
        {'head.*': {'lr': 0.1}}
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{owner}({name}={shown(value)}): {name} must be {such_as}.")
    return dict(value)
