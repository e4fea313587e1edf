# SPDX-License-Identifier: Apache-2.0
"""What is public explains itself: arguments, errors, and an example or the name of what has one."""

import inspect
import re
import types

import pytest

import lightning_optkit as ok

MODULES = [name for name in ok.__all__ if inspect.ismodule(getattr(ok, name))]
PUBLIC = {
    f"{folder}.{name}": found
    for folder in MODULES
    for name, found in ((name, getattr(getattr(ok, folder), name)) for name in getattr(ok, folder).__all__)
    if inspect.isclass(found) or inspect.isfunction(found)
}
TYPES = (types.UnionType, type(ok.init.Scheme))  # `Length`, `Scheme`: an alias holds no docstring


def documentation(found):
    """Its own: one that is inherited speaks of another class."""
    return inspect.cleandoc((vars(found).get("__doc__") if inspect.isclass(found) else found.__doc__) or "")


def built_by(found):
    """The functions that run when it is called, down to those of torch, Lightning and Python."""
    if inspect.isfunction(found):
        return [found]
    if getattr(found, "_is_protocol", False):
        return []  # which nobody calls; `typing` gives it an `__init__`
    ours = [cls for cls in found.__mro__ if cls.__module__.startswith("lightning_optkit.")]
    made = [vars(cls).get(name) for cls in ours for name in ("__init__", "__post_init__")]
    return [each for each in made if inspect.isfunction(each) and each.__code__.co_filename.endswith(".py")]


def arguments(found):
    if inspect.isclass(found) and not built_by(found) and not hasattr(found, "__dataclass_fields__"):
        return []  # a protocol, or a TypedDict
    parameters = [*inspect.signature(found).parameters.values()]
    names = ["Stages" if each.kind is each.VAR_KEYWORD and each.name == "stages" else each.name for each in parameters]
    return [name for name in names if not name.startswith("_")]


def described(name, text):
    """As an item of Args or Attributes, or in the words of the text."""
    return re.search(rf"^ *{name}(, \w+)*:|^ *(\w+, )+{name}:|`{name}`|[`\.]{name}\b", text, flags=re.M)


def examples(found):
    return ">>>" in documentation(found)


def test_the_lists_hold_what_the_test_judges():
    others = {
        f"{folder}.{name}"
        for folder in MODULES
        for name in getattr(ok, folder).__all__
        if f"{folder}.{name}" not in PUBLIC
    }
    assert all(isinstance(getattr(getattr(ok, name.split(".")[0]), name.split(".")[1]), TYPES) for name in others)
    assert len(PUBLIC) > 200 and {"optimizers.AdamW", "schedules.cosine", "recipes.recipe"} <= {*PUBLIC}


@pytest.mark.parametrize("name", PUBLIC)
def test_it_says_what_it_is_and_what_each_argument_means(name):
    found, text = PUBLIC[name], documentation(PUBLIC[name])
    assert len(text.split("\n")[0]) > 15, "no docstring"
    assert not text.startswith(f"{found.__name__}("), "the docstring that a dataclass makes up"
    assert not [each for each in arguments(found) if not described(each, text)]


@pytest.mark.parametrize("name", PUBLIC)
def test_what_checks_its_arguments_names_the_errors(name):
    found = PUBLIC[name]
    checks = [each for each in built_by(found) if re.search(r"\braise |\bcheck(ed)?_\w+\(", inspect.getsource(each))]
    if checks:
        assert re.search(r"^Raises:\n +\w+(Error|Exit|Interrupt)\b", documentation(found), flags=re.M)


@pytest.mark.parametrize("name", PUBLIC)
def test_it_has_an_example_or_names_what_has_one(name):
    found, text = PUBLIC[name], documentation(PUBLIC[name])
    named = {word.split(".")[-1] for quoted in re.findall(r"`([\w.]+)[`(]", text) for word in [quoted]}
    reached = [other for path, other in PUBLIC.items() if path.split(".")[-1] in named and other is not found]
    assert examples(found) or any(map(examples, reached))
