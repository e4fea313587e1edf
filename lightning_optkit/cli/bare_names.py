# SPDX-License-Identifier: Apache-2.0
"""Class names without a dot in the files of `optkit fit` and its relatives."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from inspect import isclass

import torch
from lightning.pytorch import callbacks as lightnings
from torch import nn

import lightning_optkit

__all__ = ["bare_names"]

# Their import is what makes names known to jsonargparse.
_FOLDERS = ("averaging", "callbacks", "clipping", "data", "layers", "optimizers")


@contextmanager
def bare_names() -> Iterator[None]:
    """`class_path: Fuse` is enough; a name that torch or Lightning has as well, such as AdamW, goes on meaning theirs.

    jsonargparse looks a bare name up among `__subclasses__()` of the expected type, and refuses one that two of them
    have, so ours are left out there.
    """
    for folder in _FOLDERS:
        import_module(f"lightning_optkit.{folder}")
    ours = {value for name in dir(lightning_optkit) if isclass(value := getattr(lightning_optkit, name))}
    taken = {cls for cls in ours if any(hasattr(library, cls.__name__) for library in (torch.optim, lightnings, nn))}

    def others(cls: type) -> list[type]:
        found: list[type] = []
        each: type
        for each in type.__subclasses__(cls):
            found += others(each) if each in taken else [each]
        return found

    with ExitStack() as stack:
        for parent in {base for cls in taken for base in cls.__bases__}:
            setattr(parent, "__subclasses__", classmethod(others))  # noqa: B010  (mypy knows no such attribute)
            stack.callback(delattr, parent, "__subclasses__")
        yield
