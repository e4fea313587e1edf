# SPDX-License-Identifier: Apache-2.0
"""Every recipe trains the module that it is made for, on real data, and its file says why each value is what it is."""

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import torch
import yaml

import lightning_optkit as ok
from lightning_optkit.cli import main
from lightning_optkit.recipes import recipe, recipe_names, recipe_text

EXAMPLE = Path(__file__).parents[2] / "examples" / "recipes.py"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("recipes_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_run_for_every_recipe(example):
    assert tuple(example.RUNS) == tuple(example.MEASURES) == recipe_names()
    assert ok.recipe is recipe


@pytest.mark.parametrize("name", recipe_names())
def test_it_trains_and_its_average_fits_the_run(example, name):
    """A tenth of the steps of the example; no message about an average that is too long."""
    torch.manual_seed(0)
    module, training, validation, steps = example.RUNS[name]()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    callbacks = recipe(name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = example.trainer(max(steps // 10, 10), callbacks)
        trainer.fit(module, training)
        trainer.limit_val_batches = 1.0
        (measured,) = trainer.validate(module, validation, verbose=False)
    assert not [each for each in said if "lightning_optkit" in each.filename or "average" in str(each.message)]
    assert torch.isfinite(torch.tensor(measured["loss"]))
    assert [name for name, param in module.named_parameters() if torch.equal(param, before[name])] == []


@pytest.mark.parametrize(("name", "bound"), [("mlp", 0.7), ("timeseries", 0.8), ("finetune", 0.15)])
def test_it_learns(example, name, bound):
    """Whole runs of a second: without the recipe 0.97 and 1.8 for the two that need its scales."""
    reached, _ = example.train(name, with_recipe=True)
    assert reached < bound


@pytest.mark.parametrize("name", recipe_names())
def test_every_value_has_its_reason_in_a_comment_above(name):
    text = recipe_text(name)
    assert text.startswith("# ") and "In the module:" in text
    lines = text.splitlines()
    for place, line in enumerate(lines):
        if line.startswith("    - class_path:"):
            assert lines[place - 1].startswith("    # "), line
    entries = yaml.safe_load(text)["trainer"]["callbacks"]
    assert [entry["class_path"].partition(".")[0] for entry in entries] == ["lightning_optkit"] * len(entries)
    assert max(map(len, lines)) <= 116


@pytest.mark.parametrize("name", recipe_names())
def test_no_value_is_a_number_of_steps(name):
    """Lengths are fractions of the run, so that a recipe fits a run of any length."""
    for _, value in re.findall(r"\b(steps|warmup|decay|start|every|at): (\d[\w.]*)", recipe_text(name)):
        assert "." in value


def test_new_callbacks_each_time():
    first, second = recipe("cnn"), recipe("cnn")
    assert [type(each) for each in first] == [type(each) for each in second]
    assert not {id(each) for each in first} & {id(each) for each in second}


def test_another_name_is_refused():
    with pytest.raises(ValueError, match=r"^recipe\(name='resnet'\): name must be one of 'mlp', 'cnn', "):
        recipe("resnet")


def test_the_command_prints_the_file(capsys, tmp_path):
    main(["recipe", "gan"])
    assert capsys.readouterr().out == recipe_text("gan")
    main(["recipe"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in recipe_names())
    with pytest.raises(SystemExit) as exit_info:
        main(["recipe", "resnet"])
    assert exit_info.value.code == 2
