# SPDX-License-Identifier: Apache-2.0
"""The contents of a report, that it is self-contained, and that records stay small and plain."""

import html
import io
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib
import pytest
import torch

from lightning_optkit.diagnostics import Curve, RunRecord, Verdict, result_rows, write_report
from lightning_optkit.diagnostics._figures import Line, chart, smoothed
from lightning_optkit.diagnostics._report_charts import charts_of

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Cells of every table, and the nesting of the tags."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.open, self.unbalanced = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def a_run(name, scale=1.0, steps=60):
    taken = list(range(1, steps + 1))
    return RunRecord(
        name,
        num_steps=steps,
        loss=Curve(taken, [scale / step for step in taken]),
        learning_rate={"group 0": Curve(taken, [1e-3] * steps)},
        grad_norm={"net": Curve(taken, [scale * step for step in taken])},
        grad_norm_clipped={"net": Curve(taken, [min(scale * step, 30.0) for step in taken])},
        metrics={"val_acc": Curve([30, 60], [0.5, 0.75])},
        timings={"optimizer tail": 2.0 * scale},
        explanation=f"plan of {name}",
    )


@pytest.fixture
def page(tmp_path):
    return write_report([a_run("plain"), a_run("fused", 0.5)], tmp_path / "report.html").read_text()


def test_needs_nothing_outside_itself(page):
    assert not re.search(r"https?:|//\w|<script|<link|<img|@import|\bsrc=", page)
    references = re.findall(r'href="([^"]*)"|url\(([^)]*)\)', page)
    assert references and all((href or url).startswith("#") for href, url in references)


def test_every_id_is_there_once_and_every_reference_finds_one(page):
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page))
    assert {href or url for href, url in referred} <= set(ids)


def test_is_well_formed_and_shows_results_plans_and_environment(page):
    parsed = Page(page)
    assert not parsed.unbalanced and not parsed.open
    assert ["optimizer tail, median (ms)", "2", "1 (2x faster)"] in parsed.rows
    assert ["val_acc, last", "0.7500", "0.7500"] in parsed.rows
    assert ["val_acc, best", *["0.7500 at step 60"] * 2] in parsed.rows
    assert "<pre>plan of plain</pre>" in page and "<pre>plan of fused</pre>" in page
    facts = dict(row for row in parsed.rows if len(row) == 2)
    assert facts["torch"].startswith(torch.__version__)
    assert {"lightning", "extension", "instruction set"} <= facts.keys()


def test_charts_hold_each_run_and_take_their_ink_from_the_page(page):
    charts = re.findall(r"<figcaption><b>(.*?)</b>.*?</figcaption>\s*(<svg.*?</svg>)", page, re.DOTALL)
    assert [title for title, _ in charts] == ["Loss", "val_acc", "Learning rate", "Gradient norm"]
    for _, svg in charts:
        assert ">plain</text>" in svg and ">fused</text>" in svg
        assert "currentColor" in svg
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == {"#2f81d6", "#dd6b10"}  # no black, no white
        assert re.match(r"<svg\s+viewBox=", svg)  # no size of its own: the page scales it


def test_works_on_small_and_dark_screens(page):
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page


def test_names_cannot_inject(tmp_path):
    run = a_run("<u>&")
    run.settings, run.callbacks, run.clip = {"<u>": "<u>"}, {"<u>": "<u>"}, "<u>"
    run.verdicts = [Verdict("wrong_mode", "<u>", "<u>", "<u>", "<u>", 0, 1.0)]
    page = write_report([run], tmp_path / "report.html", title="<i>").read_text()
    assert "<u>" not in page and "<i>" not in page
    assert page.count("&lt;u&gt;&amp;") >= 2 and page.count("&lt;u&gt;") >= 10


def test_an_empty_record_makes_a_report_without_curves(tmp_path):
    page = write_report([RunRecord("empty")], tmp_path / "report.html").read_text()
    assert "<figure" not in page and "The plan" not in page and "Environment" in page
    assert "GradientHealth" not in page


def test_makes_folders_and_returns_where_it_wrote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_report([RunRecord("run")], "a/b/report.html")
    assert path == tmp_path / "a" / "b" / "report.html" and path.exists()


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_rejects_runs_that_cannot_be_told_apart(tmp_path, names):
    message = rf"\(runs={re.escape(repr(names))}\): runs must be one or more, each with a name of its own\.$"
    with pytest.raises(ValueError, match="^write_report" + message):
        write_report([RunRecord(name) for name in names], tmp_path / "report.html")
    with pytest.raises(ValueError, match="^result_rows" + message):
        result_rows([RunRecord(name) for name in names])
    assert not list(tmp_path.iterdir())


def test_slower_is_called_slower_and_unknown_is_left_open():
    runs = [RunRecord("a", timings={"step": 1.0}), RunRecord("b", timings={"step": 4.0, "other": 1.0})]
    assert result_rows(runs) == [
        ("step, median (ms)", "1", "4 (4x slower)"),
        ("other, median (ms)", "", "1"),
    ]


def test_the_last_five_percent_of_the_loss_are_averaged():
    run = RunRecord("run", loss=Curve(list(range(1, 41)), [9.0] * 38 + [1.0, 2.0]))
    assert ("training loss, last 5 %", "1.5000") in result_rows([run])


def test_gradient_norms_are_compared_over_the_steps_that_all_runs_measured():
    dense = RunRecord("dense", grad_norm={"net": Curve([1, 2, 3], [5.0, 99.0, 7.0])})
    dense.grad_norm_clipped["net"] = Curve([1, 2, 3], [1.0, 1.0, 7.0])
    sparse = RunRecord("sparse", grad_norm={"net": Curve([1, 3], [5.0, 7.0])})
    rows = {row[0]: row[1:] for row in result_rows([dense, sparse])}
    assert rows["gradient norm, median, 2 common steps"] == ("6", "6")
    assert rows["steps clipped, 2 common steps"] == ("50% of 2 measured", "")
    assert ("gradient norm, median", "7") in result_rows([dense])


@pytest.mark.parametrize(("every", "told"), [(1, ""), (10, "Circles: measured every few steps.")])
def test_rare_measurements_are_not_joined_by_a_line(every, told):
    run = a_run("run")
    measured = list(range(1, 61, every))
    run.grad_norm, run.grad_norm_clipped = {"net": Curve(measured, [2.0] * len(measured))}, {}
    (drawn,) = [each for each in charts_of([run]) if each.title == "Gradient norm"]
    assert drawn.caption == f"Of all parameters together. {told}".strip()


def test_smoothing_does_not_lag_and_keeps_the_mean_of_a_spike():
    ramp = Curve(list(range(300)), [float(i) for i in range(300)])
    assert smoothed(ramp).values == pytest.approx(ramp.values, abs=1e-9)
    spike = Curve(list(range(300)), [0.0] * 150 + [1.0] + [0.0] * 149)
    hill = smoothed(spike).values
    assert sum(hill) == pytest.approx(1.0) and max(hill) < 0.25
    assert hill.index(max(hill)) == 150


def test_curves_with_gaps_zeros_or_one_point_are_drawn():
    values = [math.nan, 1.0, math.inf, 0.0]
    assert "<path" in chart([Line(Curve([1, 2, 3, 4], values), 0, "run")], ylabel="loss", log=True)
    assert "<use" in chart([Line(Curve([1], [1.0]), 0, "run")], ylabel="loss", log=True)
    assert smoothed(Curve([1], [math.nan])) == Curve()


def test_the_same_curves_give_the_same_file(tmp_path):
    pages = [write_report([a_run("run")], tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_a_long_curve_is_thinned_evenly():
    curve = Curve()
    for step in range(1, 100_001):
        curve.append(step, float(step))
    assert 2_000 < len(curve.steps) < 4_097
    assert curve.steps[0] == 1 and curve.num_appended == 100_000
    assert {b - a for a, b in zip(curve.steps, curve.steps[1:], strict=False)} == {curve.every}
    assert curve.values == [float(step) for step in curve.steps]


def test_a_record_survives_a_checkpoint_that_loads_weights_only():
    record, buffer = a_run("run"), io.BytesIO()
    torch.save(record.to_dict(), buffer)
    buffer.seek(0)
    restored = RunRecord.from_dict(torch.load(buffer, weights_only=True))
    assert restored == record and isinstance(restored.metrics["val_acc"], Curve)
    restored.loss.append(61, 0.0)
    assert record.loss.steps[-1] == 60


def test_drawing_leaves_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    chart([Line(Curve([1, 2], [1.0, 2.0]), 0, "run")], ylabel="loss")
    assert dict(matplotlib.rcParams) == before


def test_matplotlib_and_jinja_are_imported_only_to_write(tmp_path):
    code = (
        "import sys; from lightning_optkit.diagnostics import RunRecord, write_report, Curve; "
        "assert not {'matplotlib', 'jinja2', 'lightning'} & sys.modules.keys(); "
        f"write_report([RunRecord('run', loss=Curve([1], [1.0]))], {str(tmp_path / 'report.html')!r}); "
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


NAMES = [
    "cost $x^$ y", r"a $\frac{1}$", r"100% \ $$", "lr=$1e-3, wd=$0", "_hidden", "<script>alert(1)</script>", "a/../b",
    "模型", "модель", "العربية", "🙂", "#123456", 'x id="a_1" xmlns="y"', "&amp;", "{{ 7 * 7 }}", "100pt",
]  # fmt: skip


@pytest.mark.parametrize("place", ["name", "metrics", "learning_rate"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is_written(tmp_path, name, place):
    curves = {name: Curve([1, 2], [2.0, 1.0]), "other": Curve([1, 2], [1.0, 1.0])}
    given = {"name": name} if place == "name" else {"name": "run", place: curves}
    run = RunRecord(**{"loss": Curve([1, 2], [2.0, 1.0]), **given})
    page = write_report([run, RunRecord("second", loss=run.loss)], tmp_path / "r.html").read_text()
    texts = re.findall(r"<text[^>]*>(.*?)</text>", page)
    assert any(html.escape(name, quote=False) in text for text in texts)
    assert "<script>" not in page
    assert Page(page).unbalanced == []


@pytest.mark.parametrize("name", NAMES)
def test_the_chart_of_one_run_has_its_name(tmp_path, name):
    page = write_report([RunRecord(name, loss=Curve([1, 2], [2.0, 1.0]))], tmp_path / "r.html").read_text()
    assert f"<title>Loss: {html.escape(name, quote=False)}</title>" in page.split("<svg", 1)[1]
    assert Page(page).unbalanced == []


@pytest.mark.parametrize("name", ["two\nlines", "x" * 5000, "half \ud800", "\x00\x07", "tab\there"])
def test_a_name_that_cannot_be_printed_is_made_so(tmp_path, name):
    run = RunRecord(name, loss=Curve([1, 2], [2.0, 1.0]), metrics={name: Curve([1], [1.0])})
    page = write_report([run], tmp_path / "r.html").read_text()
    texts = re.findall(r"<text[^>]*>(.*?)</text>", page)
    assert len(texts) > 4 and all(len(text) <= 60 and text.isprintable() for text in texts)


def test_a_page_does_not_follow_the_users_settings_of_matplotlib(tmp_path):
    with matplotlib.rc_context({"text.usetex": True, "text.parse_math": True}):
        page = write_report([a_run("a_b & $c"), a_run("second")], tmp_path / "r.html").read_text()
    assert ">a_b &amp; $c</text>" in page


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Curve([1], []), ValueError, r"^Curve\(values=<0>\): values must be as many as steps, 1\.$"),
        (lambda: Curve([1], ["a"]), TypeError, r"^Curve\(values='a'\): values must be a number"),
        (lambda: RunRecord(None), TypeError, r"^RunRecord\(name=None\): name must be a name, such as \"plain\"\.$"),
        (lambda: RunRecord("a", loss=[1.0]), TypeError, r"^RunRecord\(loss=\[1\.0\]\): loss must be a curve such as"),
        (lambda: RunRecord("a", metrics={"m": 3}), TypeError, r"^RunRecord\(metrics\['m'\]=3\): .* must be a curve"),
        (lambda: RunRecord.from_dict({}), ValueError, r"^RunRecord\.from_dict\(saved=\[\]\): saved must hold 'name'"),
        (lambda: write_report(None, "r"), TypeError, r"^write_report\(runs=None\): runs must be a list of records"),
        (lambda: write_report([RunRecord("a")], None), TypeError, r"^write_report\(path=None\): path must be a path"),
        (
            lambda: write_report([RunRecord("a")], "."),
            ValueError,
            r"^write_report\(path='.*'\): path must be a file, not",
        ),
        (
            lambda: result_rows([RunRecord]),
            TypeError,
            r"^result_rows\(runs=RunRecord\): runs must be a list of records",
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_colored_message_leaves_no_control_characters_on_the_page(tmp_path):
    run = a_run("run\x07")
    run.ended = {"when": "in step 3", "by": "ValueError: \x1b[31mred\x1b[0m\n\tand more"}
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "\N{REPLACEMENT CHARACTER}[31mred" in page and "\n\tand more" in page
    assert not re.findall(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", page)
