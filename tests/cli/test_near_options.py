# SPDX-License-Identifier: Apache-2.0
"""A misspelled option, command or choice is said with what was meant, by the parser of every command."""

import pytest
import yaml

from lightning_optkit.cli import main

MODEL = {"model": {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}}


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (["tset"], ". Near it: test."),
        (["fti"], ". Near it: fit."),
        (["recipe", "mpl"], ". Near it: mlp."),
        (["bench", "--threads", "x"], "error: argument --threads: x is none of int, null."),
        (["compare", "--task", "run.yaml", "--seeds", "1", "a"], "error: argument --seeds: a is no int."),
        (["list", "--anywere", "clip"], "unrecognized arguments: --anywere. Near it: --anywhere."),
        (["report", "logs", "--outptu=x.html"], "unrecognized arguments: --outptu=x.html. Near it: --output."),
        (["plot-schedule", "warmup_cosin"], "'warmup_stable_decay'). Near it: warmup_cosine."),
        (["plot-schedule", "cosine", "--min_fctor", "0.1"], "--min_fctor 0.1. Near it: --min_factor."),
        (["recipe", "transfomer"], ". Near it: transformer."),
        (["list", "--xyzzy"], "error: unrecognized arguments: --xyzzy"),
        (["validate", "--config", "run.yaml", "--ckpt_pth", "a"], "--ckpt_pth a. Near it: --ckpt_path."),
        (["doctor", "--config", "run.yaml", "--jsn"], "unrecognized arguments: --jsn. Near it: --json."),
    ],
)
def test_what_was_meant_is_said(words, end, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(MODEL))
    with pytest.raises(SystemExit, match=r"^2$"):
        main(words)
    assert capsys.readouterr().err.rstrip().endswith(end)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["compare", "--tried", "mlp"], "--task"),
        (["report"], "paths"),
        (["completion"], "shell"),
        (["plot-schedule", "warmup", "--steps", "2"], "--schedule"),
    ],
)
def test_what_is_missing_is_named_as_it_is_given_with_the_usage_of_its_command(capsys, words, sentence):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(words)
    said = capsys.readouterr().err
    assert said.startswith(f"usage: optkit {words[0]}") and f"optkit {words[0]} --help" in said
    assert said.endswith(f"error: the following arguments are required: {sentence}\n")


def test_a_required_option_stands_without_brackets(capsys):
    with pytest.raises(SystemExit):
        main(["compare"])
    assert "usage: optkit compare --task TASK [--tried" in capsys.readouterr().err
