# SPDX-License-Identifier: Apache-2.0
"""What plot draws, on which axes, and its lack of side effects."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from lightning_optkit.schedules import cosine, plot, sgdr


def test_draws_the_factor_of_each_schedule():
    axes = plot(cosine(), sgdr(), total_steps=80)
    for line, schedule in zip(axes.lines, (cosine(), sgdr()), strict=True):
        steps, factors = line.get_data()
        assert steps[0] == 0 and 79 < steps[-1] < 80
        np.testing.assert_array_equal(factors, [schedule(step, 80) for step in steps])


def test_labels_are_the_calls_unless_given():
    assert [line.get_label() for line in plot(cosine(), total_steps=10).lines] == [repr(cosine())]
    axes = plot(cosine(), sgdr(), total_steps=10, labels=["one", "two"])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]


def test_draws_into_the_axes_it_is_given():
    axes = Figure().subplots()
    assert plot(cosine(), total_steps=10, ax=axes) is axes
    assert len(axes.lines) == 1


def test_the_figure_can_be_saved(tmp_path):
    plot(cosine(), total_steps=10).figure.savefig(tmp_path / "cosine.png")
    assert (tmp_path / "cosine.png").read_bytes().startswith(b"\x89PNG")


def test_matplotlib_is_imported_only_to_draw():
    code = (
        "import sys; from lightning_optkit.schedules import cosine, plot; assert 'matplotlib' not in sys.modules; "
        "plot(cosine(), total_steps=10); assert 'matplotlib' in sys.modules; "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_rejects_nothing_to_draw():
    with pytest.raises(ValueError, match=r"^plot\(schedules=\(\)\): schedules must hold at least one Schedule\.$"):
        plot(total_steps=10)


def test_rejects_what_is_no_schedule():
    with pytest.raises(TypeError, match=r"^plot\(schedules=0.5\): schedules must be a Schedule, such as cosine\(\)\.$"):
        plot(0.5, total_steps=10)


def test_rejects_labels_that_do_not_match():
    with pytest.raises(ValueError, match=r"^plot\(labels=\['a'\]\): labels must have one entry per schedule \(2\)\.$"):
        plot(cosine(), sgdr(), total_steps=10, labels=["a"])


def test_rejects_a_run_without_a_length():
    with pytest.raises(ValueError, match=r"^plot\(total_steps=0\): total_steps must be in \(0, inf\)\.$"):
        plot(cosine(), total_steps=0)


def test_draws_nothing_if_one_schedule_does_not_fit():
    axes = Figure().subplots()
    with pytest.raises(ValueError, match=r"^cosine\(steps=20\): steps must not exceed total_steps=10\.$"):
        plot(cosine(), cosine(steps=20), total_steps=10, ax=axes)
    assert not axes.lines
