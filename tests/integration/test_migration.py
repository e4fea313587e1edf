# SPDX-License-Identifier: Apache-2.0
"""The migration tables: our names exist and take these arguments, and so does every installed name of theirs."""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

import lightning_optkit as ok

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"
TITLES = ["Lightning", "torch", "apex", "timm", "composer", "transformers' TrainingArguments", "FlashOptim"]
TITLES.append("pytorch_optimizer")


def tables():
    """title -> rows of (theirs, ours, note)."""
    parts = re.split(r"^## (.*)\n", PAGE.read_text(), flags=re.M)[1:]
    found = {}
    for title, text in zip(parts[::2], parts[1::2], strict=True):
        lines = [line for line in text.splitlines() if line.startswith("|")]
        found[title] = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return found


TABLES = tables()
OURS = sorted(
    {code for rows in TABLES.values() for row in rows for code in re.findall(r"`(ok\.[^`]*)`", " ".join(row))}
)
THEIRS = {title: [code for row in rows for code in re.findall(r"`([^`]+)`", row[0])] for title, rows in TABLES.items()}


def test_the_page_has_the_tables_with_three_columns_and_a_counterpart_or_a_reason_in_each_row():
    assert list(TABLES) == TITLES and len(OURS) > 120
    for rows in TABLES.values():
        for row in rows:
            assert len(row) == 3 and row[0] and (row[1] or row[2]), row


def named(path, base):
    for name in path.split("."):
        base = getattr(base, name)
    return base


def calls(code):
    """(function, positional arguments, keywords) of every call of ours in the code, also nested ones."""
    for node in ast.walk(ast.parse(code, mode="eval")):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("ok."):
            yield named(ast.unparse(node.func)[3:], ok), node.args, [each.arg for each in node.keywords]


@pytest.mark.parametrize("code", OURS)
def test_our_name_exists_and_takes_the_arguments(code):
    found = named(re.match(r"ok\.([\w.]+)", code)[1], ok)
    assert callable(found)
    if "(" not in code:
        return
    for function, positional, keywords in calls(code):
        signature = inspect.signature(function)
        assert {*keywords} <= {*signature.parameters}, f"{code}: {signature}"
        taken = [each for each in signature.parameters.values() if each.kind == each.POSITIONAL_OR_KEYWORD]
        assert len(positional) <= len(taken) or "args" in signature.parameters or function is ok.schedules.plot


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", [code for code in OURS if "..." not in code])
def test_a_complete_call_makes_what_it_says(code):
    names = {"ok": ok, "torch": torch, "params": [torch.nn.Parameter(torch.ones(3, 3))], "weight": len}
    free = {node.id for node in ast.walk(ast.parse(code, mode="eval")) if isinstance(node, ast.Name)} - {*names}
    if free:  # a model, an optimizer
        assert free <= {"model", "optimizer", "name", "formula", "arguments"}
        return
    made = eval(code, names)
    if "(" in code:
        assert type(made).__module__.startswith("lightning_optkit."), made


@pytest.mark.parametrize("code", THEIRS["torch"])
def test_a_name_of_torch_exists(code):
    if code == "label_smoothing":
        assert code in inspect.signature(torch.nn.CrossEntropyLoss).parameters
        return
    module, _, name = code.rpartition(".")
    assert getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("code", THEIRS["Lightning"])
def test_a_name_of_lightning_exists(code):
    call = ast.parse(code, mode="eval").body
    found = pl.Trainer if ast.unparse(call.func) == "Trainer" else named(ast.unparse(call.func), pl)
    parameters = inspect.signature(found).parameters
    assert {each.arg for each in call.keywords} <= {*parameters}


def test_the_names_of_transformers_exist():
    transformers = pytest.importorskip("transformers", "5")
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    arguments = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    values = {"lr_scheduler_type": {each.value for each in SchedulerType}, "optim": {n.value for n in OptimizerNames}}
    of = None
    for code in THEIRS["transformers' TrainingArguments"]:
        name, _, value = code.partition("=")
        if name.startswith('"'):
            name, value = of, code
        assert name in arguments, code
        if value:
            assert value.strip('"') in values[name], code
            of = name
