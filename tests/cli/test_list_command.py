# SPDX-License-Identifier: Apache-2.0
"""`optkit list` knows every strategy, finds by words, and shows one in full."""

import re
from pathlib import Path

import pytest

import lightning_optkit as ok
from lightning_optkit.cli import main
from lightning_optkit.cli.list_command import entries


def shown(capsys, *words):
    main(["list", *words])
    return capsys.readouterr().out


def test_every_strategy_is_there_with_a_sentence():
    found = entries()
    rows = re.findall(
        r"`((?:callbacks|optimizers|schedules|init|data|layers|clipping|averaging|regularization)/\w+)`",
        (Path(__file__).parents[2] / "docs" / "strategies.md").read_text(),
    )
    assert len(found) > len(rows) - 30 > 100
    assert {entry.folder for entry in found} == {row.partition("/")[0] for row in rows}
    for entry in found:
        assert re.match(r"[A-Z`|0-9]", entry.summary), entry
    names = {entry.name for entry in found}
    assert {f"ok.{name}" for name in ok.callbacks.__all__} <= names
    assert {"ok.schedules.cosine", "ok.init.he", "ok.AdamW", "ok.regularization.sam"} <= names


def test_words_find_what_has_all_of_them(capsys):
    found = shown(capsys, "percentile", "NORM")
    assert "ok.AutoClip" in found and "ok.ZClip" not in found
    only = shown(capsys, "rises", "--of", "schedules")
    assert "ok.schedules.warmup_cosine" in only and "ok.schedules.constant" not in only and "Callbacks" not in only
    assert only.splitlines()[-1].endswith("One in full: optkit list NAME.")


def test_one_name_is_shown_in_full(capsys):
    found = shown(capsys, "Fuse")
    assert found.startswith("ok.Fuse\n") and "rounding:" in found and "Raises:" in found


@pytest.mark.parametrize(("word", "near"), [("xyzzy", ""), ("warmup_cosinus", " Near it: warmup_cosine.")])
def test_what_is_not_there_is_said_in_a_sentence(word, near):
    with pytest.raises(SystemExit) as exit_info:
        main(["list", word])
    sentence = f"optkit list {word}: nothing has these words; `optkit list` shows everything."
    assert exit_info.value.code == sentence + near


def test_a_narrow_terminal_has_the_description_below_the_name(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    main(["list", "--of", "layers"])
    lines = capsys.readouterr().out.splitlines()
    place = lines.index(next(line for line in lines if line.strip() == "ok.WeightStandardizedConv2d"))
    assert lines[place + 1].startswith("    `torch.nn.Conv2d` whose") and max(map(len, lines)) <= 40
