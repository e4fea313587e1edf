# SPDX-License-Identifier: Apache-2.0
"""The end of a fit in a terminal: 80 columns, no color, no matplotlib."""

import math
import subprocess
import sys

import pytest

from lightning_optkit.diagnostics import Curve, RunRecord, Verdict
from lightning_optkit.diagnostics._summary import summary_text, table_text

STEPS = list(range(1, 201))


def a_run(**more):
    loss = Curve(STEPS, [10.0 ** (-step / 50) for step in STEPS])
    rates = {"group 0": Curve(STEPS, [step / 200 for step in STEPS])}
    metrics = {"val_acc": Curve([100, 200], [0.9, 0.8])}
    given = dict(num_steps=200, loss=loss, learning_rate=rates, metrics=metrics, elapsed_s=Curve([200], [61.0]))
    return RunRecord("run", **{**given, **more})


def test_curves_results_and_findings():
    verdict = Verdict("lr_too_high", None, "updates are large", "0.5", "lr=0.1", 3, 0.9)
    lines = summary_text(a_run(verdicts=[verdict])).splitlines()
    assert lines[0] == "run: 200 steps in 1 min 1 s"
    (loss,) = [line for line in lines if line.startswith("loss")]
    assert loss.split()[1] == "".join(sorted(loss.split()[1], reverse=True)) and loss.split()[1][0] == "█"
    assert len(set(loss.split()[1])) == 8  # evenly over the decades, not one step down
    (rate,) = [line for line in lines if line.startswith("learning rate")]
    assert rate.split()[2] == "".join(sorted(rate.split()[2])) and rate.endswith("0.005 to 1")
    assert any(line.split() == ["val_acc,", "best", "0.9000", "at", "step", "100"] for line in lines)
    assert lines[-1] == f"GradientHealth: {verdict}"
    assert summary_text(a_run(verdicts=[])).endswith("GradientHealth: nothing is wrong")
    assert "GradientHealth" not in summary_text(a_run())


@pytest.mark.parametrize("name", ["x" * 500, "[red]name[/red]", "模型", "two\nlines", "\x1b[31m"])
def test_names_are_cut_and_mean_nothing(name):
    run = a_run(metrics={name: Curve([1, 2], [1.0, 2.0])}, clip="AutoClip(", logged={})
    text = summary_text(run)
    assert all(len(line) <= 80 for line in text.splitlines()) and "\x1b" not in text
    assert ("[red]name[/red]" in text) == (name == "[red]name[/red]")


def test_a_run_without_anything_is_one_line():
    assert summary_text(RunRecord("empty")) == "empty: 0 steps"
    flat = a_run(loss=Curve([1, 2], [1.0, 1.0]), metrics={"m": Curve([1], [math.nan])})
    assert "▁▁" in summary_text(flat)


def test_a_table_names_its_columns():
    lines = table_text([("loss", "1.0", "2.0")], ["", "plain", "fused"]).splitlines()
    assert lines[0].split() == ["plain", "fused"] and lines[-1].split() == ["loss", "1.0", "2.0"]


def test_needs_no_matplotlib():
    code = (
        "import sys; from lightning_optkit.diagnostics import RunRecord; "
        "from lightning_optkit.diagnostics._summary import summary_text; summary_text(RunRecord('run')); "
        "assert not {'matplotlib', 'jinja2'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("width", [40, 60])
def test_it_fits_a_narrow_terminal(width):
    run = a_run(verdicts=[])
    lines = summary_text(run, width).splitlines()
    assert max(map(len, lines)) <= width and any("▁" in line for line in lines)
    words = " ".join(summary_text(run).split())
    assert all(word in " ".join(" ".join(lines).split()) for word in words.split() if not set(word) & set("▁▂▃▄▅▆▇█"))


def test_no_number_is_cut_in_a_narrow_table():
    rows = [("training loss, last 5 %", "0.121 +- 0.014", "0.1213456 +- 0.00055")]
    lines = table_text(rows, ["", "as it is", "clipped.yaml"], 36).splitlines()
    assert max(map(len, lines)) <= 36 and "…" not in "".join(lines)
    assert "0.00055" in "".join(lines) and "0.014" in "".join(lines)


@pytest.mark.parametrize("width", [20, 40, 50, 60, 80])
def test_no_word_is_broken_in_a_narrow_table(width):
    heads = ["", "as it is", "image_classification", "mine.yaml"]
    rows = [
        ("runs", "3", "3", "3"),
        ("training loss, last 5 %", "0.001234 +- 0.00012", "0.85 +- 0.071", "0.9"),
        ("val_acc, last", "0.93 +- 0.01", "", "not finite, 1 without a number"),
    ]
    text = table_text(rows, heads, width)
    lines, words = text.splitlines(), text.replace(":", "").split()
    assert max(map(len, lines)) <= max(width, len("  image_classification:"))
    assert all(word in words for row in [heads, *rows] for cell in row for word in cell.split())
    assert width < 40 or all(any(cell in line for line in lines) for cell in rows[1][1:])
    assert (lines[0] == "runs") == (width < 80)  # a block per row


def test_a_constant_rate_is_drawn_as_one():
    steps = [*range(1, 200)]
    rate = Curve(steps, [0.003] * len(steps))
    line = next(line for line in summary_text(a_run(learning_rate={"a": rate})).splitlines() if "learning rate" in line)
    blocks, *said = line.removeprefix("learning rate").split()
    assert set(blocks) == {"▁"} and said == ["0.003,", "constant"]


@pytest.mark.parametrize(("number", "said"), [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (1001, "1,001 steps")])
def test_one_step_is_one(number, said):
    assert summary_text(RunRecord("LM", num_steps=number)).splitlines()[0] == f"LM: {said}"
