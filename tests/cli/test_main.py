# SPDX-License-Identifier: Apache-2.0
"""The command as a user types it."""

import os
import subprocess
import sys

import pytest
import torch

import lightning_optkit as ok
from lightning_optkit.cli import main
from lightning_optkit.cli.main import COMMANDS, TRAINER_COMMANDS
from lightning_optkit.diagnostics import environment


def optkit(*words, **variables):
    return subprocess.run(
        [sys.executable, "-m", "lightning_optkit", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **variables},
        timeout=60,
    )


def test_info_prints_every_fact_of_the_environment():
    result = optkit("info")
    assert result.returncode == 0 and result.stderr == ""
    lines = {" ".join(line.split()) for line in result.stdout.splitlines()}
    for name, fact in environment().items():
        assert " ".join(f"{name} {fact}".split()) in lines


def test_info_says_which_instruction_set_was_asked_for():
    result = optkit("info", OPTKIT_CPU_ISA="baseline")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "OPTKIT_CPU_ISA baseline" in lines
    assert any(line.startswith(("instruction set baseline ", "instruction set torch's")) for line in lines)


def test_info_says_in_one_sentence_what_is_wrong_with_the_environment():
    if "absent" in environment()["extension"]:
        pytest.skip("without the extension there is no instruction set to choose")
    result = optkit("info", OPTKIT_CPU_ISA="sse")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("environment(OPTKIT_CPU_ISA='sse'): OPTKIT_CPU_ISA must be one of ")
    assert result.stderr.count("\n") == 1


def test_help_names_each_command_with_its_purpose(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "usage: optkit" in shown
    for name, summary in {**TRAINER_COMMANDS, **COMMANDS}.items():
        assert f"{name} {summary}" in shown
    assert "-c CONFIG" not in shown  # no option that no command has
    assert "commands: `optkit COMMAND --help` says more of each. fit Trains" in shown  # nothing of the parser between


def test_help_of_schedules_names_them_below_their_heading(capsys):
    with pytest.raises(SystemExit):
        main(["plot-schedule", "--help"])
    shown = capsys.readouterr().out
    assert "(required)" not in shown and "\nschedules:\n" in shown and "\n    cosine " in shown


@pytest.mark.parametrize("words", [["bogus"], ["info", "--bogus"]])
def test_words_it_does_not_know_are_refused_with_the_way_to_help(words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(words)
    assert exit_info.value.code == 2
    assert "--help" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_begins_with_its_line_and_is_no_docstring(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert COMMANDS[name] in shown and "Raises:" not in shown


def test_the_version(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0 and capsys.readouterr().out.split()[-1] == ok.__version__


def test_main_takes_its_words_from_the_caller(capsys):
    main(["info"])
    assert torch.__version__ in capsys.readouterr().out


def test_info_does_not_wait_for_lightning():
    code = "import sys; from lightning_optkit.cli import main; main(['info']); assert 'lightning' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "program", ["optkit", "/bin/optkit", "/x/pytest/__main__.py", "/x/lightning_optkit/__main__.py"]
)
def test_without_words_it_prints_its_help_under_the_name_it_was_started_by(program, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    main()
    shown = capsys.readouterr().out
    name = "python -m lightning_optkit" if program.endswith("lightning_optkit/__main__.py") else "optkit"
    assert shown.startswith(f"usage: {name} COMMAND [options]\n") and "info" in shown


@pytest.mark.parametrize(
    ("words", "usage", "absent"),
    [
        (["list", "--help"], "usage: optkit list", "Raises:"),
        (["bench", "--help"], "usage: optkit bench [--seconds", "network:"),  # a heading that repeats the sentence
        (["plot-schedule", "cosine", "--help"], "usage: optkit plot-schedule [options] cosine", "Args:"),
        (["fit"], "usage: optkit fit --config CONFIG", "{fit,validate"),
    ],
)
def test_the_usage_of_a_command_begins_with_it(words, usage, absent, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["optkit"])
    with pytest.raises(SystemExit):
        main(words)
    out, err = capsys.readouterr()
    assert (out + err).startswith(usage) and absent not in out + err


def test_as_a_module_it_says_so():
    result = optkit()
    assert result.returncode == 0 and result.stdout.startswith("usage: python -m lightning_optkit COMMAND")
