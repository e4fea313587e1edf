# SPDX-License-Identifier: Apache-2.0
"""Text that fits the terminal, and stays as it is in a file."""

import pytest

from lightning_optkit._terminal import announce, fitted, width


@pytest.mark.parametrize(("columns", "expected"), [("40", 40), ("7", 20), ("200", 80)])
def test_the_terminals_width_is_used_up_to_80(monkeypatch, columns, expected):
    monkeypatch.setenv("COLUMNS", columns)
    assert width() == expected


def test_without_a_terminal_it_is_80(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("os.get_terminal_size", lambda fd: (_ for _ in ()).throw(OSError("no terminal")))
    assert width() == 80


def test_only_long_lines_are_wrapped_and_indented():
    text = "short\n  of a block: first > second > third\n\n  kept  as  it is"
    assert fitted(text, 24).split("\n") == [
        "short", "  of a block: first >", "    second > third", "", "  kept  as  it is",
    ]  # fmt: skip
    assert fitted(text, 80) == text
    assert fitted("a-word-that-is-too-long", 10) == "a-word-that-is-too-long"


def test_a_file_gets_the_lines_as_they_are(monkeypatch):
    long = "word " * 40
    monkeypatch.setenv("COLUMNS", "80")
    assert fitted(long) == long
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, fitted(long).split("\n"))) <= 60


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_takes_its_time_is_said_at_a_terminal_alone(is_terminal, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    announce("Testing 100 rates.")
    assert capsys.readouterr() == ("", "Testing 100 rates.\n" if is_terminal else "")
