# SPDX-License-Identifier: Apache-2.0
"""Stages are defined once, and every optimizer shows all of them."""

import inspect
import pydoc
import typing

import pytest
import torch
from jsonargparse import ArgumentParser

import lightning_optkit.optimizers
from lightning_optkit.optimizers import Adam, AdamW, Prodigy, ScheduleFreeSGD
from lightning_optkit.step import OnePassOptimizer, Stages
from lightning_optkit.step.stages import STAGE_DEFAULTS, completed

OPTIMIZERS = [
    value
    for value in vars(lightning_optkit.optimizers).values()
    if isinstance(value, type) and issubclass(value, OnePassOptimizer)
]


def one():
    return [torch.nn.Parameter(torch.ones(2))]


def test_there_are_optimizers_to_look_at():
    assert len(OPTIMIZERS) >= 20


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_the_signature_has_every_stage_by_keyword_with_its_default_and_type(cls):
    shown, hints = inspect.signature(cls).parameters, typing.get_type_hints(Stages)
    for name, default in STAGE_DEFAULTS.items():
        assert shown[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert shown[name].default == default
        assert shown[name].annotation == hints[name]
    assert all(param.kind is not inspect.Parameter.VAR_KEYWORD for param in shown.values())


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_help_describes_every_argument(cls):
    text, arguments = pydoc.render_doc(cls, renderer=pydoc.plaintext), inspect.signature(cls).parameters
    documented = text.split("Methods defined here")[0]
    assert [name for name in arguments if documented.count(f"      {name}: ") != 1] == []
    assert "**stages" not in documented


def test_what_a_class_says_of_a_stage_is_said_in_the_place_of_the_common_line():
    assert "Must be None: the rule keeps an average itself." in ScheduleFreeSGD.__doc__
    assert "e.g. `EMA(0.999)`" not in ScheduleFreeSGD.__doc__


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_defaults_are_those_shown(cls):
    optimizer = cls(one() if cls.__name__ != "Muon" else [torch.nn.Parameter(torch.ones(2, 2))])
    group = optimizer.param_groups[0]
    of_groups = {name: value for name, value in STAGE_DEFAULTS.items() if name in group}
    flags = {"cautious": False, "caution": False, "decouple_lr": False, "centralize": False}
    assert of_groups == {"l1": 0.0, "rounding": "nearest", **flags}
    assert (optimizer.clip, optimizer.average, optimizer.state_dtype) == (None, None, torch.float32)
    assert optimizer.record_statistics is False


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_an_argument_that_is_none_is_refused_as_python_does(cls):
    with pytest.raises(TypeError, match=rf"{cls.__name__}.__init__\(\) got an unexpected keyword argument 'clipp'"):
        cls(one(), clipp=None)


def test_a_subclass_without_an_init_shows_that_of_its_base():
    class Mine(Adam):
        pass

    assert inspect.signature(Mine) == inspect.signature(Adam)


def test_a_subclass_with_an_init_of_its_own_shows_its_own():
    class Mine(AdamW):
        """Mine."""

        def __init__(self, params, *, warm: float = 1.0, **stages: typing.Any) -> None:
            super().__init__(params, warm, **stages)

    assert list(inspect.signature(Mine).parameters) == ["params", "warm", "stages"]
    assert Mine.__doc__ == "Mine."
    assert Mine(one(), l1=0.5).param_groups[0]["l1"] == 0.5


def test_completing_keeps_what_was_given():
    assert completed("X", {"l1": 0.5}) == {**STAGE_DEFAULTS, "l1": 0.5}


def test_a_command_line_has_types_and_help_of_the_stages(capsys):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Prodigy, "optimizer", skip={"params"})
    assert parser.parse_args(["--optimizer.l1=0.5"]).optimizer.l1 == 0.5
    with pytest.raises(Exception, match="rounding"):
        parser.parse_args(["--optimizer.rounding=upwards"])
    parser.print_help()
    assert "zeros are exact" in " ".join(capsys.readouterr().out.split())


def test_help_prints_the_documentation_of_torchs_class_no_second_time():
    page = pydoc.plain(pydoc.render_doc(AdamW))
    assert page.count("Implements AdamW algorithm") == 0 and page.count("class AdamW(") == 1
