# SPDX-License-Identifier: Apache-2.0
"""The table of an initialization."""

from lightning_optkit.init import InitRow, render_rows


def test_a_row_per_parameter_with_every_field():
    rows = [InitRow("", "weight", "he, relu", (4, 3), 0.81649), InitRow("net.1", "bias", "zeros", (), 0.0)]
    lines = render_rows(rows).splitlines()
    assert lines[0].split() == ["module", "parameter", "scheme", "shape", "std"]
    assert lines[2].split() == ["(model)", "weight", "he,", "relu", "4x3", "0.816"]
    assert lines[3].split() == ["net.1", "bias", "zeros", "()", "0"]


def test_no_line_is_longer_than_the_width():
    rows = [InitRow("a.very.long.name" * 4, "weight", "left as it was: no rule for Something", (4, 3), 0.8)]
    assert max(map(len, render_rows(rows, width=50).splitlines())) <= 50


def test_square_brackets_are_not_taken_for_markup():
    assert "[red]" in render_rows([InitRow("m[red]", "weight", "he", (1,), 0.0)])
