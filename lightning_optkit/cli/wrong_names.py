# SPDX-License-Identifier: Apache-2.0
"""What jsonargparse says of a wrong name or value in a file, cut down to where it is and the names that are near it."""

import pkgutil
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from inspect import isclass, isfunction, signature
from typing import Any, NoReturn

import torch
from lightning.pytorch import Trainer, callbacks, loggers
from lightning.pytorch.cli import LightningArgumentParser

import lightning_optkit
from lightning_optkit._near_names import near_names
from lightning_optkit.cli.list_command import FOLDERS
from lightning_optkit.cli.near_options import with_near_options
from lightning_optkit.cli.other_lightning import about_other_lightning
from lightning_optkit.cli.users_folders import users_folders
from lightning_optkit.cli.wrong_modules import about_import, about_taken, class_paths_in
from lightning_optkit.cli.wrong_values import about_value

__all__ = ["ParserWithNearNames", "about_key", "in_short", "our_sentence_in"]

_FOLDERS_OF_PACKAGE = (*FOLDERS, "diagnostics", "recipes")
_KEYS = ("model", "data", "trainer", "optimizer", "lr_scheduler", "seed_everything", "ckpt_path", "config")

# A file of a LightningCLI with a class of its own names none: the arguments seem to be those of Lightning's own.
_NAMES_NO_CLASS = ("lightning.LightningModule", "lightning.LightningDataModule")
_EXAMPLES = {"model": "my_file.MyNet", "data": "my_file.MyData"}

_MISSING = re.compile(
    r"(?:module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'"
    r"|cannot import name '(?P<class>\w+)' from '(?P<package>[\w.]+)')(?:\. .*)?"  # of this package
)


class ParserWithNearNames(LightningArgumentParser):
    """The parser of a LightningCLI that says what is wrong in one line where it can."""

    def add_subcommands(self, required: bool = True, dest: str = "subcommand", **kwargs: Any) -> Any:
        """Adds commands under the name of the program; by default its whole usage stands in front of each."""
        return super().add_subcommands(required, dest, **{"prog": self.prog, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program, or raises if it was built so."""
        is_of_a_class = not self.exit_on_error  # its message becomes a part of another one
        said = in_short(message) or (not is_of_a_class and about_key(message))
        super().error(said or with_near_options(message, self.format_help()), ex)


def in_short(message: str) -> str | None:
    r"""One line in place of a message of jsonargparse; None for a message of another form, which is left as it is.

    jsonargparse tries every class that a key may have and lists what each of them says, the value itself last. The
    fault is in the innermost class that it could import, or else in the name of a class.

    Args:
        message: What the parser would print.

    Example:
        >>> in_short('Parser key "trainer.callbacks":\n  Errors:\n    - Expected a dot import path string: Fuze')
        'trainer.callbacks: there is no class Fuze. Near it: Fuse.'
    """
    key = re.match(r'Parser key "([\w.]+)":', message)
    if not key:
        return None
    at_key = f"{key[1]}: "
    for path in class_paths_in(message):
        if sentence := about_import(path) or about_other_lightning(path):
            return at_key + sentence
    owner, inside = _innermost(message)
    if not owner:
        if key[1] in _EXAMPLES and "Not a valid subclass of" in message and (value := _given(message)):
            return f"{at_key}{value} is no class; {_as_in(key[1])}"
        if sentence := about_value(message.partition("\n")[2]):
            return at_key + sentence
        unknown = re.search(r"Expected a dot import path string: (\w+)$", message, flags=re.M)
        return unknown and at_key + _about_class(unknown[1])
    detail = re.sub(r'Parser key "([\w.]+)":', r"\1:", " ".join(line.strip(" -") for line in inside))
    if found := re.search(r"Expected a dot import path string: (\w+)", detail):
        return at_key + _about_class(found[1])
    if found := re.fullmatch(r"Option '(\w+)(?:\.[\w.]+)?' is not accepted", detail):
        if ours := _ours_that_has(found[1], owner):
            return f"{at_key}{owner} has no argument {found[1]}; {ours} has it."
        if owner in _NAMES_NO_CLASS:
            return at_key + _as_in(key[1], found[1])
        arguments = _arguments(owner)
        said = _said(f"{owner} has no argument {found[1]}", found[1], arguments)
        return at_key + (said if "Near it" in said else f"{said} It has {', '.join(arguments) or 'none'}.")
    if found := _MISSING.fullmatch(detail):
        module, name = found["module"] or found["package"], found["name"] or found["class"]
        if owner.startswith(f"{module}.{name}"):  # not a mistake inside of the user's module
            said = _said(f"there is no {name} in {module}", name, dir(import_module(module)))
            return f"{at_key}{said} {about_taken(owner)}".rstrip()
    if found := re.fullmatch(r"(?:[\w.]+: )*No module named '([\w.]+)'(?:; .* is not a package)?", detail):
        package, _, name = found[1].rpartition(".")
        if not package and name in _FOLDERS_OF_PACKAGE:
            wanted = owner if hasattr(import_module(f"lightning_optkit.{name}"), owner.rpartition(".")[2]) else name
            return f"{at_key}there is no module {name}. Near it: lightning_optkit.{wanted}."
        place = f" in {package}" if package else ""
        if owner.startswith(f"{found[1]}."):
            said = _said(f"there is no module {name}{place}", name, _modules_in(package))
            looked = about_taken(owner) if package else f"Looked into {_folders()}, and the installed packages."
            return f"{at_key}{said} {looked}".rstrip()
    return None if "Does not validate" in detail else f"{at_key}{owner}: {detail}"


def our_sentence_in(message: str) -> str | None:
    r"""What a class of this package said of an argument, where a place has several classes to choose from.

    jsonargparse tries each of them, and has what they say in its text alone.

    Args:
        message: What jsonargparse raised.

    Example:
        >>> our_sentence_in("Errors:\n  - no AutoClip\n  - ClipNorm(max_norm=-1.0): max_norm must be in (0, inf).")
        'ClipNorm(max_norm=-1.0): max_norm must be in (0, inf).'
    """
    names = {*dir(lightning_optkit), *_functions()}
    lines = re.findall(r"^ *- ((\w+)\(.*\): .+)$", message, flags=re.M)
    return next((line for line, name in lines if name in names), None)


def about_key(message: str) -> str | None:
    """One line about a key that no configuration has, or a file without its option; None for another message.

    Args:
        message: What the parser of the command would print.

    Example:
        >>> about_key("Subcommand 'fit' does not accept option 'trainr.max_epochs'")
        'a configuration has no trainr. Near it: trainer.'
    """
    found = re.fullmatch(
        r"Subcommand '\w+' does not accept option '([\w.-]+)'|Option '([\w.-]+)' is not accepted", message
    )
    of_group = re.fullmatch(r"Group '(\w+)' does not accept option '([\w.]+)'", message)
    if key := found or of_group:
        words = ".".join(filter(None, key.groups())).split(".")
        if words[0] not in _KEYS:
            return _said(f"a configuration has no {words[0]}", words[0], _KEYS)
        if words[0] == "trainer" and len(words) > 1:
            return _said(f"trainer has no argument {words[1]}", words[1], signature(Trainer).parameters)
    if re.fullmatch(r"the following arguments are required: (?:\w+\.)?model", message):
        return "a configuration of optkit names its model, as in model: {class_path: my_file.MyNet}; none is given."
    if found := re.fullmatch(r"unrecognized arguments: ([^\s-]\S*\.(?:ya?ml|json))", message):
        return f"{message}. A configuration is given as --config {found[1]}."
    return None


def _innermost(message: str) -> tuple[str, list[str]]:
    """The class with the most indented problem, and the lines about it; no class if none could be imported."""
    lines = message.splitlines()
    problems = [number for number, line in enumerate(lines) if "Problem with given class_path '" in line]
    if not problems:
        return "", []
    start = max(problems, key=lambda number: lines[number].index("Problem"))
    column = len(lines[start]) - len(lines[start].lstrip(" "))  # of the dash, if there is one
    inside: list[str] = []
    for line in lines[start + 1 :]:
        if len(line) - len(line.lstrip(" ")) <= column:
            break
        inside.append(line)
    return lines[start].split("'")[1], inside


def _as_in(key: str, argument: str = "") -> str:
    """How a model or data is named."""
    arguments = f", init_args: {{{argument}: ...}}" if argument else ""
    example = f"as in {key}: {{class_path: {_EXAMPLES.get(key, 'my_file.MyClass')}{arguments}}}."
    return f"it has arguments and names no class of yours; name it, {example}" if argument else f"name one, {example}"


def _given(message: str) -> str:
    """A number or a list that stands where a class must be; empty for a name, of which there is more to say."""
    value = message.splitlines()[-1].strip().partition("Given value: ")[2]
    return "" if re.fullmatch(r"[A-Za-z_][\w.]*", value.strip("'\"")) else value


def _about_class(name: str) -> str:
    """One that is there all the same is of another type than the key has."""
    functions = _functions()
    if name in functions:
        return f"{name} is no class; say {functions[name]}."
    names = _class_names()
    if name in names:
        return f"{name} is no class for this place."
    said = _said(f"there is no class {name}", name, names)
    return said if "Near it" in said else _said(f"there is no class {name}", name, functions, functions)


def _functions() -> dict[str, str]:
    """Paths of the functions of this package, by name: a file must name their modules, too."""
    found: dict[str, str] = {}
    for folder in _FOLDERS_OF_PACKAGE:
        module = import_module(f"lightning_optkit.{folder}")
        found |= {name: f"{module.__name__}.{name}" for name in module.__all__ if isfunction(getattr(module, name))}
    return found


def _said(fault: str, name: str, names: Iterable[str], paths: Mapping[str, str] | None = None) -> str:
    shown = paths or {}
    near = [shown.get(each, each) for each in near_names(name, names)]
    return f"{fault}. Near it: {', '.join(near)}." if near else f"{fault}."


def _class_names() -> set[str]:
    """Those that a file may use without a module in front."""
    folders = (lightning_optkit, callbacks, loggers, torch.optim, torch.optim.lr_scheduler)
    return {name for folder in folders for name in dir(folder) if isclass(getattr(folder, name))}


def _folders() -> str:
    return ", ".join(users_folders())


def _arguments(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return [*signature(getattr(import_module(module), name)).parameters]


def _ours_that_has(argument: str, class_path: str) -> str | None:
    """Our class of the same name, if it has the argument: a bare name that torch or Lightning has as well is theirs."""
    name = class_path.rpartition(".")[2]
    if class_path.startswith("lightning_optkit.") or not isclass(getattr(lightning_optkit, name, None)):
        return None
    ours = f"lightning_optkit.{name}"
    return ours if argument in _arguments(ours) else None


def _modules_in(package: str) -> list[str]:
    """Those of the user's folders, without a package."""
    folders = getattr(import_module(package), "__path__", []) if package else users_folders()
    return [each.name for each in pkgutil.iter_modules(folders)]
