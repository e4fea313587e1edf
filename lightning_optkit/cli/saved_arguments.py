# SPDX-License-Identifier: Apache-2.0
"""The arguments of the model that a checkpoint holds: over those of the configuration, of which it is said."""

import argparse
import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import jsonargparse
import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_optkit.callbacks.seams.lightning_private import BUILT_BY, CLASS_OF_MODULE
from lightning_optkit.cli.refused_values import RefusedValue

__all__ = ["replaced_values", "saved_arguments", "with_arguments"]


def saved_arguments(checkpoint: str) -> tuple[str | None, dict[str, Any]]:
    """The class that a checkpoint names, and its hyperparameters.

    A fit of LightningCLI saves the class with them, one in Python the arguments alone.

    Args:
        checkpoint: A whole file.

    Raises:
        ValueError: for a file that holds something else, such as a tensor.
    """
    saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
    arguments = saved.get("hyper_parameters", {}) if isinstance(saved, Mapping) else None
    if not isinstance(arguments, Mapping):
        raise ValueError(f"--ckpt_path {checkpoint}: no checkpoint of Lightning; give a file that a Trainer saved.")
    arguments = dict(arguments)
    arguments.pop(BUILT_BY, None)
    return arguments.pop(CLASS_OF_MODULE, None), arguments


def with_arguments(parser: LightningArgumentParser, config: Namespace, checkpoint: str) -> Namespace:
    """The configuration with the hyperparameters of the checkpoint, of the class of the configuration by default.

    Args:
        parser: Of the command.
        config: What it has read.
        checkpoint: A whole file.

    Raises:
        RefusedValue: for hyperparameters that the class does not take.
    """
    named, arguments = saved_arguments(checkpoint)
    if not arguments and not named:
        return config
    command = config.subcommand
    own = config[command].model.class_path
    # dict_kwargs may be of any name, and are checked by the class alone.
    place = "dict_kwargs" if _takes_any(named or own) else "init_args"
    model = {"class_path": named or own, place: arguments}
    exits, parser.exit_on_error = parser.exit_on_error, False
    try:
        whole: Namespace = parser.parse_object({command: {"model": model}}, config)
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        of_class = f"{named}, which it names" if named else f"{own}, the class of the configuration"
        said = " ".join((getattr(error, "message", "") or str(error)).removeprefix("error: ").split())
        said = re.sub(rf"^(?:{command}\.)?model: ", "", said)
        raise RefusedValue(
            f"--ckpt_path {checkpoint}: its hyperparameters ({_shown(arguments)}) do not fit {of_class}: {said}"
        ) from error
    finally:
        parser.exit_on_error = exits
    return whole


def replaced_values(before: Namespace, after: Namespace, words: Sequence[str]) -> Iterator[str]:
    """A sentence for each value that the checkpoint has replaced; a default that nobody has given is none.

    Args:
        before: The model of the configuration.
        after: The same with the hyperparameters of the checkpoint.
        words: The arguments of the command.
    """
    if before.class_path != after.class_path:
        yield f"model: {before.class_path} of the configuration is replaced by {after.class_path} of the checkpoint."
        return
    ours, theirs = _arguments(before), _arguments(after)
    defaults = _defaults(before.class_path)
    for name, value in ours.items():
        option = re.compile(rf"--model\.(?:init_args\.)?{re.escape(name)}(?:[.+=].*)?")
        is_given = any(option.fullmatch(word) for word in words)
        if name not in theirs or theirs[name] == value or (value == defaults.get(name, value) and not is_given):
            continue
        place = "command line" if is_given else "configuration"
        yield f"model.{name}: {value} of the {place} is replaced by {theirs[name]} of the checkpoint."


def _arguments(model: Namespace) -> Mapping[str, Any]:
    arguments = model.get("init_args") or {}
    return vars(arguments) if isinstance(arguments, Namespace) else arguments


def _takes_any(class_path: str) -> bool:
    """Whether it has **kwargs; for what cannot be imported, of which the parser has more to say, True."""
    try:
        return any(each.kind is each.VAR_KEYWORD for each in _parameters(class_path))
    except (ImportError, AttributeError):
        return True


def _parameters(class_path: str) -> Collection[inspect.Parameter]:
    module, _, name = class_path.rpartition(".")
    return inspect.signature(getattr(import_module(module), name)).parameters.values()


def _defaults(class_path: str) -> dict[str, Any]:
    missing = object()  # a value without a default was given by somebody: it equals nothing
    return {each.name: missing if each.default is each.empty else each.default for each in _parameters(class_path)}


def _shown(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
