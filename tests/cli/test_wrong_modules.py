# SPDX-License-Identifier: Apache-2.0
"""A user's module that fails, or that another one of its name hides, is said with file and line."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import _util

from lightning_optkit.cli import main
from lightning_optkit.cli.wrong_modules import about_import, about_taken, class_paths_in

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def said(users_net, tmp_path, capsys):
    """What `optkit COMMAND` prints of a class of the model, or of a callback, less the lines that lead to the help."""

    def of_class(path, command="fit", key="model", folder="."):
        named = {"class_path": path}
        content = {"model": named} if key == "model" else {"trainer": {"callbacks": [{"class_path": "Fuse"}, named]}}
        content = {"model": {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}} | content
        file = tmp_path / folder / "run.yaml"
        file.write_text(yaml.safe_dump(content))
        with pytest.raises(SystemExit, match=r"^2$"):
            main([command, "--config", str(file)])
        usage, _tip, line = capsys.readouterr().err.splitlines()
        assert usage.startswith("usage: ")
        return line.removeprefix("error: ")

    return of_class


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import torch\ndef net(:\n    pass\n", "SyntaxError: invalid syntax (users_net.py, line 2)."),
        (
            "if True:\npass\n",
            "IndentationError: expected an indented block after 'if' statement on line 1 (users_net.py, ",
        ),
        (
            "\n\nimport not_there_at_all\n",
            "ModuleNotFoundError: No module named 'not_there_at_all' (users_net.py, line 3).",
        ),
        ("from json import lodes\n", "ImportError: cannot import name 'lodes' from 'json' ("),
        ("\nrates = 1 / 0\n", "ZeroDivisionError: division by zero (users_net.py, line 2)."),
        ("import json\njson.loads('{')\n", "JSONDecodeError: Expecting property name "),
    ],
)
@pytest.mark.parametrize(("command", "key"), [("fit", "model"), ("explain", "trainer.callbacks")])
def test_one_that_fails_is_said_with_its_line(said, users_net, command, key, source, sentence):
    users_net(source)
    line = said("users_net.Net", command, key)
    assert line.startswith(f"{key}: users_net cannot be imported: {sentence}") and "(users_net.py, line " in line


def test_the_line_is_that_of_the_module_which_fails(said, users_net, tmp_path):
    users_net("\nimport users_layers\n")
    (tmp_path / "users_layers.py").write_text("import json\n\n\njson.loads('{')\n")
    assert said("users_net.Net").endswith("(users_layers.py, line 4).")


REGISTRY = "runs = []\n\ndef register():\n    runs.append(1)\n    assert len(runs) < 2, 'already there'\n"
SAID = {
    "undefined_thing": "NameError: name 'undefined_thing' is not defined",
    "import not_there_at_all": "ModuleNotFoundError: No module named 'not_there_at_all'",
}


@pytest.mark.parametrize("path", ["users_net.Net", "users_nets.inner.Net", "users_nets.Net"])
@pytest.mark.parametrize("key", ["model", "trainer.callbacks"])
@pytest.mark.parametrize("fault", SAID)
def test_one_that_registers_something_and_fails_is_run_once(said, users_net, tmp_path, fault, key, path):
    source = f"import users_registry\nusers_registry.register()\n{fault}\n"
    (tmp_path / "users_registry.py").write_text(REGISTRY)
    users_net(source)
    (tmp_path / "users_nets").mkdir()
    (tmp_path / "users_nets" / "__init__.py").write_text("" if "inner" in path else "from users_nets import inner\n")
    (tmp_path / "users_nets" / "inner.py").write_text(source)
    try:
        line = said(path, key=key)
        runs = sys.modules["users_registry"].runs
    finally:
        for name in ("users_registry", "users_nets", "users_nets.inner"):
            sys.modules.pop(name, None)
    file = "users_net.py" if path == "users_net.Net" else "users_nets/inner.py"
    assert line.startswith(f"{key}: {path.removesuffix('.Net')} cannot be imported: ")
    assert line.endswith(f"{SAID[fault]} ({file}, line 3).")
    assert runs == [1]


def test_the_next_run_imports_it_anew(said, users_net):
    users_net("undefined_thing\n")
    assert "NameError" in said("users_net.Net")
    users_net("class Net: pass\n")
    assert said("users_net.Other") == "model: there is no Other in users_net."
    assert "__import__" not in vars(_util)  # jsonargparse is as it was


@pytest.mark.parametrize("is_package", [False, True])
@pytest.mark.parametrize("name", ["json", "time", "token"])  # a package, one that is built in, and one without
def test_one_that_python_hides_is_named(said, tmp_path, name, is_package):
    taken = getattr(sys.modules[name], "__file__", "built in").removesuffix("/__init__.py")
    hidden = tmp_path / name if is_package else tmp_path / f"{name}.py"
    if is_package:
        hidden.mkdir()
    (hidden / "__init__.py" if is_package else hidden).write_text("class Net: pass")
    line = said(f"{name}.Net", "fit" if is_package else "explain")
    assert line.startswith(f"model: there is no Net in {name}. ")
    end = f"{name} is a module of Python itself ({taken}); {hidden} is hidden by it and needs another name."
    assert line.endswith(end)
    if is_package:
        assert said(f"{name}.nets.Net").endswith(end)


def test_of_two_of_a_name_the_one_taken_is_said(said, users_net, tmp_path):
    users_net("class Net: pass")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "users_net.py").write_text("class Other: pass")
    here, there = tmp_path / "users_net.py", tmp_path / "configs" / "users_net.py"
    assert said("users_net.Other", folder="configs") == (
        f"model: there is no Other in users_net. Of the modules called users_net, {here} was taken, not {there}."
    )
    there.unlink()
    assert said("users_net.Other", folder="configs") == "model: there is no Other in users_net."


def test_what_can_be_imported_or_is_not_there_has_other_sentences():
    assert about_import("json.Net") is None and about_import("not_there_at_all.Net") is None
    assert about_import("json.not_there.Net") is None
    assert about_taken("json.Net") == f"json is a module of Python itself ({Path(json.__file__).parent})."
    assert about_taken("torch.Net") == "" and about_taken("not_there_at_all.Net") == ""


def test_paths_are_found_in_each_form():
    assert class_paths_in("Problem with given class_path 'a.B':\nGiven value: a.b.C") == ["a.B", "a.b.C"]
    assert class_paths_in("Given value: {'class_path': 'Fuse'}") == []
