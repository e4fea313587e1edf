# SPDX-License-Identifier: Apache-2.0
"""What torch or Lightning refuses of an optimizer or a scheduler: its key, or the line of `configure_optimizers`."""

import inspect
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core import optimizer as checks
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["about_optimizer"]

_REFUSALS = (ValueError, TypeError, ArithmeticError)
_LIGHTNING = str(Path(lightning.__file__).parent)
_PACKAGE = str(Path(__file__).parents[1])
_LIBRARIES = (str(Path(torch.__file__).parent), _LIGHTNING, "<frozen ")
_BUILDING = {"__init__", "add_param_group"}
_STEPPING = {"step", "get_lr"}  # of a scheduler, which divides by its arguments there


class _Call(NamedTuple):
    frame: FrameType
    file: str
    name: str
    line: int


def about_optimizer(error: BaseException, of_run: Mapping[str, Any], of_package: str | None = None) -> str | None:
    """The key and the sentence; None for anything else, errors in the user's own code included.

    What the run leads to by itself counts: an optimizer that Lightning builds of the file, what the user's
    `configure_optimizers` builds and returns, and a scheduler that Lightning steps.

    Args:
        error: What ended the run.
        of_run: The configuration of the command.
        of_package: What this package says if it is its own error.
    """
    calls = [
        _Call(frame, frame.f_code.co_filename, frame.f_code.co_name, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    inside = _of_libraries(calls)  # what the last line outside of torch and Lightning led to
    if isinstance(error, MisconfigurationException) and calls[-1].file == checks.__file__:
        return f"{_key('lr_scheduler', of_run)}: {error}"  # Lightning looks at what configure_optimizers returned
    found = next((place for place, each in enumerate(inside) if _is_of_torch(each)), None)
    if found is None or not isinstance(error, _REFUSALS):
        return of_package and _in_users_code(calls, of_run, of_package)
    refusing = inside[found].frame.f_locals["self"]
    sentence = _sentence(error, inside[found].frame)
    if said := _in_users_code(calls, of_run, sentence):
        return said
    if any(each.file.startswith(_LIGHTNING) for each in inside[:found]):
        return f"{_key('optimizer' if isinstance(refusing, Optimizer) else 'lr_scheduler', of_run)}: {sentence}"
    return None


def _of_libraries(calls: list[_Call]) -> list[_Call]:
    """The last calls, of which all are in torch or Lightning."""
    place = len(calls)
    while place and calls[place - 1].file.startswith(_LIBRARIES):
        place -= 1
    return calls[place:]


def _in_users_code(calls: list[_Call], of_run: Mapping[str, Any], sentence: str) -> str | None:
    """The sentence with the line of `configure_optimizers`, or of a function that it calls; None outside of it."""
    of_user = [each for each in calls if not each.file.startswith((*_LIBRARIES, _PACKAGE))]
    if not any(each.name == "configure_optimizers" for each in of_user):
        return None
    place = f"{Path(of_user[-1].file).name}, line {of_user[-1].line}"
    return f"{_key('', of_run)}: configure_optimizers: {sentence.rstrip('.')} ({place})."


def _is_of_torch(call: _Call) -> bool:
    """Whether it builds an optimizer, or builds or steps a scheduler."""
    owner = call.frame.f_locals.get("self")
    if isinstance(owner, LRScheduler):
        return call.name in _BUILDING | _STEPPING
    return isinstance(owner, Optimizer) and call.name in _BUILDING


def _key(kind: str, of_run: Mapping[str, Any]) -> str:
    """Where it stands: in the file, or in the code of the model."""
    if of_run.get(kind):
        return kind
    path = getattr(of_run.get("model"), "class_path", None)
    return f"model: {path}" if path else "model"


def _sentence(error: BaseException, frame: FrameType) -> str:
    """With the arguments where the error does not name them, as that of a division."""
    refusing = frame.f_locals["self"]
    said, name = " ".join(str(error).split()).rstrip("."), type(refusing).__name__
    is_raised = (traceback.extract_tb(error.__traceback__)[-1].line or "").startswith("raise ")
    if is_raised and said:
        return f"{name}: {said}."
    given = frame.f_locals if frame.f_code.co_name == "__init__" else vars(refusing)
    shown = [
        f"{each.name}={given[each.name]!r}"
        for each in [*inspect.signature(type(refusing)).parameters.values()][1:]
        if each.name in given and each.name != "last_epoch" and repr(given[each.name]) != repr(each.default)
    ]
    return f"{name}({', '.join(shown)}): torch cannot compute with these arguments ({said})."
