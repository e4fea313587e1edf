# SPDX-License-Identifier: Apache-2.0
"""What a reader finds on the page, and that a browser shows it: on a telephone, in the dark, without a network."""

import re
import shutil
import subprocess

import pytest

from lightning_optkit.diagnostics import Curve, RunRecord, Verdict, result_rows, write_report
from lightning_optkit.diagnostics._comparison import comparison_rows
from lightning_optkit.diagnostics._figures import Line, chart
from lightning_optkit.diagnostics._heat_map import heat_map, range_of
from lightning_optkit.diagnostics._report_charts import charts_of, heat_maps_of
from lightning_optkit.diagnostics._report_tables import goal_of, settings_rows
from lightning_optkit.diagnostics._summary import summary_text

STEPS = list(range(1, 101))


def a_run(name, *, rate=1e-3, callbacks=("Fuse",), **more):
    given = dict(
        num_steps=100,
        loss=Curve(STEPS, [2.0 / step for step in STEPS]),
        learning_rate={"group 0": Curve(STEPS, [rate] * 100)},
        grad_norm={"net": Curve(STEPS, [1.0 + step % 7 for step in STEPS])},
        grad_norm_clipped={"net": Curve(STEPS, [1.0] * 100)},
        metrics={"val_loss": Curve([50, 100], [0.9, 1.1]), "val_acc": Curve([50, 100], [0.8, 0.7])},
        logged={"train_loss": Curve(STEPS, [3.0 / step for step in STEPS]), "train_acc": Curve(STEPS, [0.5] * 100)},
        elapsed_s=Curve(STEPS, [0.1 * step for step in STEPS]),
        layers={
            "grad_norm": {f"blocks.{at}.linear": Curve([1, 50, 100], [10.0**-at, 1.0, 2.0]) for at in range(3)},
            "closed": {"relu 0": Curve([1, 100], [0.0, 0.5])},
        },
        settings={"date": "2026-01-01 10:00", "seed": "1", "batch size": "32"},
        callbacks=dict.fromkeys(callbacks, ""),
        explanation="lightning_optkit.AdamW, " + "a long line of a plan " * 10,
        environment={"torch": "2.13"},
    )
    return RunRecord(name, **{**given, **more})


VERDICT = Verdict("lr_too_high", "net.0", "updates replace the weights", "one step changed all of it", "lr=0.3", 4, 0.9)


def test_a_log_has_no_heading_without_a_picture_and_no_share_of_few_steps_alone():
    few = a_run("log", layers={}, grad_norm={"net": Curve([9], [2.0])}, grad_norm_clipped={"net": Curve([9], [1.0])})
    assert heat_maps_of([few]) == [] and len(heat_maps_of([few, a_run("whole")])) == 2
    assert ("steps clipped", "100% of 1 measured") in result_rows([few])


def texts(svg):
    return re.findall(r"<text[^>]*>(.*?)</text>", svg)


def test_what_differs_between_runs_comes_first(tmp_path):
    runs = [a_run("plain", callbacks=()), a_run("fused", callbacks=("Fuse", "SAM"), verdicts=[VERDICT])]
    runs[1].settings["seed"] = "2"
    assert settings_rows(runs) == (
        [("Fuse", "", "yes"), ("SAM", "", "yes"), ("seed", "1", "2")],
        [("batch size", "32")],
    )
    page = write_report(runs, tmp_path / "r.html").read_text()
    places = [
        page.index(text)
        for text in ("lr too high", "<h2>What differs", "<h2>Results", "that all runs have (1)", "<h2>Curves")
    ]
    assert places == sorted(places)
    assert page.count("a long line of a plan a long") and page.count("<pre>") == 1  # equal plans are shown once
    assert re.search(r"<details>\s*<summary>Environment", page)


def test_a_single_run_shows_its_settings_and_no_legend_where_one_line_is(tmp_path):
    run = a_run("alone", logged={})
    page = write_report([run], tmp_path / "r.html").read_text()
    assert "Callbacks and settings" in page and "What differs" not in page
    drawn = {each.title: each for each in charts_of([run])}
    assert {"training", "val_loss"} <= {*texts(drawn["Loss"].svg)}
    assert {"before clipping", "after clipping"} <= {*texts(drawn["Gradient norm"].svg)}
    for title in ("Learning rate", "val_acc"):
        assert all(
            re.fullmatch(r"[\d.\N{MINUS SIGN}]+|step|learning rate|acc", text) for text in texts(drawn[title].svg)
        )


def test_last_and_best_of_every_metric():
    rows = {row[0]: row[1] for row in result_rows([a_run("run")])}
    assert rows["val_loss, best"] == "0.9000 at step 50" and rows["val_loss, last"] == "1.1000"
    assert rows["val_acc, best"] == "0.8000 at step 50" and rows["val_acc, last"] == "0.7000"
    unknown = a_run("run", metrics={"spread": Curve([1, 2], [3.0, 1.0])})
    rows = {row[0]: row[1] for row in result_rows([unknown])}
    assert rows["duration"] == "10.0 s"
    assert rows["spread, lowest"] == "1.0000 at step 2" and rows["spread, highest"] == "3.0000 at step 1"
    assert goal_of("spread", [a_run("run", goals={"spread": "max"})]) == "max"


def test_training_and_validation_of_one_quantity_are_one_chart():
    drawn = charts_of([a_run("run")])
    assert [each.title for each in drawn] == ["Loss", "val_acc", "Learning rate", "Gradient norm"]
    assert "Dashes with points: validation." in drawn[0].caption
    assert {"training", "val_acc"} <= {*texts(drawn[1].svg)}


def test_several_runs_are_compared_in_time_too():
    fast = a_run("fast", elapsed_s=Curve(STEPS, [0.01 * step for step in STEPS]))
    drawn = {each.title: each for each in charts_of([a_run("slow"), fast])}
    assert "seconds" in texts(drawn["Loss against time"].svg)


def test_rates_that_are_far_apart_have_a_logarithmic_axis():
    drawn = {each.title: each for each in charts_of([a_run("a"), a_run("b", rate=3.0)])}
    assert "0.01" in texts(drawn["Learning rate"].svg) and "1" in texts(drawn["Learning rate"].svg)


def test_manual_steps_show_what_the_module_logs_in_two_colors():
    manual = dict(
        loss=Curve(),
        metrics={},
        logged={
            "d_loss": Curve(STEPS, [0.5] * 100),
            "g_loss": Curve(STEPS, [1.0] * 100),
            "temperature": Curve([1], [2.0]),
        },
        learning_rate={"generator": Curve(STEPS, [1e-4] * 100), "critic": Curve(STEPS, [4e-4] * 100)},
    )
    drawn = {each.title: each for each in charts_of([a_run("GAN", **manual)])}
    assert {"d_loss, g_loss", "temperature", "Learning rate"} <= drawn.keys()
    for title, names in (("d_loss, g_loss", {"d_loss", "g_loss"}), ("Learning rate", {"generator", "critic"})):
        assert names <= {*texts(drawn[title].svg)}
        assert len(set(re.findall(r"stroke: (#[0-9a-f]{6})", drawn[title].svg))) == 2
    rows = {row[0]: row[1] for row in result_rows([a_run("GAN", **manual)])}
    assert rows["d_loss, last 5 %"] == "0.5000" and rows["g_loss, last 5 %"] == "1.0000"


def test_groups_with_the_same_rate_share_a_line():
    rates = {f"group {at}": Curve(STEPS, [1e-3] * 100) for at in range(4)} | {"head": Curve(STEPS, [1e-2] * 100)}
    drawn = {each.title: each for each in charts_of([a_run("run", learning_rate=rates)])}
    assert {"group 0 to group 3", "head"} <= {*texts(drawn["Learning rate"].svg)}


def test_a_clip_that_is_meant_to_act_often_does_not_alarm():
    rows = {row[0]: row[1] for row in result_rows([a_run("run", clip="AutoClip(percentile=10, window=1000)")])}
    assert rows["steps clipped"].startswith("86%, as it is meant to")
    rows = {row[0]: row[1] for row in result_rows([a_run("run", clip="ClipNorm(max_norm=1.0)")])}
    assert rows["steps clipped"] == "86%"


def test_where_nothing_clips_no_share_of_clipped_steps_is_named():
    unclipped = a_run("run", grad_norm_clipped=a_run("run").grad_norm)
    assert "steps clipped" not in {row[0] for row in result_rows([unclipped])}
    never = a_run("never", clip="ClipNorm(max_norm=9.0)", grad_norm_clipped=unclipped.grad_norm)
    assert ("steps clipped", "", "0%") in result_rows([unclipped, never])


def test_times_that_are_as_good_as_the_same_are_called_so():
    runs = [a_run(str(at), timings={"step": 1.0 + at / 100}) for at in (0, 4, 8)]
    assert result_rows(runs)[-1] == ("step, median (ms)", "1", "1.04 (the same)", "1.08 (1.1x slower)")


def with_steps(name, times):
    run = a_run(name, step_ms=Curve([*range(1, len(times) + 1)], times))
    run.timings = {"training step": sorted(times)[len(times) // 2], "other": 1.0}
    return run


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (
            [1.5, 2.0, 3.0, 4.0, 9.0],
            "3 (the same within the spread of the steps)",
        ),  # median 1.5 times that of the first
        ([0.5, 1.0, 1.2, 2.2, 2.4], "1.2 (the same within the spread of the steps)"),
        ([5.0, 5.5, 6.0, 6.5, 7.0], "6 (3x slower)"),
        ([0.5, 0.6, 0.7, 0.8, 0.9], "0.7 (2.9x faster)"),
    ],
)
def test_a_ratio_of_steps_is_named_beyond_their_spread_alone(times, said):
    runs = [with_steps("a", [1.0, 1.5, 2.0, 3.0, 4.0]), with_steps("b", times)]
    rows = {row[0]: row[1:] for row in result_rows(runs)}
    assert rows["training step, median (ms)"] == ("2", said) and rows["other, median (ms)"] == ("1", "1 (the same)")


def test_layers_of_all_runs_have_one_scale():
    runs = [a_run("a"), a_run("b", layers={"grad_norm": {"net": Curve([1, 2], [100.0, 1.0])}})]
    (title, caption, drawn), (closed, *_) = heat_maps_of(runs)
    assert title == "Gradients of each layer" and caption and closed == "Closed units"
    assert [each.title for each in drawn] == ["a", "b"]
    assert all("100" in texts(each.svg) and "0.01" in texts(each.svg) for each in drawn)


def test_a_heat_map_says_where_a_value_is_large():
    svg = heat_map(
        {"low": Curve([1, 100], [1e-3] * 2), "high": Curve([1, 100], [1.0] * 2)}, label="n", bounds=(1e-3, 1.0)
    )
    cells = re.findall(r'<path d="M ([\d.]+) ([\d.]+)[^"]*" [^>]*fill: (#\w+)', svg)
    assert {"#440154", "#fde725"} <= {color for *_, color in cells}  # the two ends of viridis
    top = {color: float(y) for _, y, color in reversed(cells)}  # behind them are those of the scale
    assert top["#440154"] < top["#fde725"]  # the first layer is on top


def test_neighbors_share_a_row_of_a_deep_network():
    deep = {f"layers.{at}": Curve([1], [1.0]) for at in range(100)}
    names = [text for text in texts(heat_map(deep, label="n", bounds=(0.1, 1.0))) if "layers" in text]
    assert len(names) == 20 and "layers.0" in names[0] and "layers.4" in names[0]
    assert range_of([{"a": Curve([1], [0.0])}]) is None


def test_findings_stand_with_their_remedy_and_a_sound_run_is_called_so(tmp_path):
    page = write_report([a_run("a", verdicts=[VERDICT]), a_run("b", verdicts=[])], tmp_path / "r.html").read_text()
    for text in (
        "lr too high",
        "in net.0, since step 4",
        "one step changed all of it",
        "<code>lr=0.3</code>",
        "Nothing is wrong",
    ):
        assert text in page


def test_a_record_is_saved_and_loaded(tmp_path):
    run = a_run("run", verdicts=[VERDICT])
    assert RunRecord.load(run.save(tmp_path / "deep" / "run.json")) == run


@pytest.mark.parametrize("text", ["no json", "[]", '{"name": "x"}', "{}"])
def test_a_file_that_is_no_record_is_refused_by_name(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=r"^RunRecord\.load\(path='.*bad\.json'\): path must be a record of"):
        RunRecord.load(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError, match=r"^RunRecord\.load\(path="):
        RunRecord.load(tmp_path / "none.json")


# --- in a browser ---

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH, which draws the page")


def chromium(page, *options):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    names = ["plain", "a name that goes on for quite a while, and on", "third", "too fast"]
    runs = [a_run(name, callbacks=("Fuse",) * (at > 0), rate=10.0**-at) for at, name in enumerate(names)]
    runs[1].callbacks["LRSchedule"] = "schedule=" + "x" * 90
    runs[3].verdicts = [VERDICT]
    return write_report(runs, tmp_path_factory.mktemp("four") / "four.html")


@in_browser
@pytest.mark.parametrize("width", [420, 1280])
def test_nothing_is_wider_than_the_screen(four, width):
    measured = four.with_name("measured.html")
    # Tables may be wider: they scroll inside of their own box. An error of the page's own would leave the title.
    script = (
        "const out = [...document.querySelectorAll('pre, figure, p, h1, h2, h3, .verdict')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth || e.scrollWidth > e.clientWidth + 1);"
        "document.title = [document.documentElement.scrollWidth, innerWidth, out.length, document.images.length].join()"
    )
    measured.write_text(four.read_text().replace("</body>", f"<script>{script}</script></body>"))
    shown = chromium(measured, f"--window-size={width},900", "--dump-dom")
    widest, screen, cut, _ = map(int, re.search(r"<title>([\d,]+)</title>", shown)[1].split(","))
    assert widest <= screen and cut == 0


@in_browser
def test_the_page_is_dark_where_the_reader_wants_it_dark(four):
    from matplotlib.image import imread

    brightness = {}
    for name, scheme in (("dark", 0), ("light", 1)):
        picture = four.with_name(f"{name}.png")
        chromium(
            four, f"--blink-settings=preferredColorScheme={scheme}", "--window-size=600,2000", f"--screenshot={picture}"
        )
        pixels = imread(picture)[..., :3]
        brightness[name] = pixels.mean(axis=2)
        assert pixels.std() > 0.05  # something is drawn
    assert brightness["dark"].mean() < 0.25 and brightness["light"].mean() > 0.8


def test_numbers_at_the_end_of_their_range_are_drawn(tmp_path):
    huge = Curve(STEPS, [1.7e308 * (-1) ** step for step in STEPS])
    run = a_run("huge", loss=huge, metrics={"val_loss": huge}, logged={"x": huge}, learning_rate={"group 0": huge})
    page = write_report([run, a_run("other")], tmp_path / "r.html").read_text()
    assert "nan" not in page.lower().replace("nanum", "") and page.count("<svg") >= 6
    assert summary_text(run).startswith("huge: 100 steps")
    assert comparison_rows({"a": [run, a_run("b", loss=Curve(STEPS, [1.7e308] * 100))]})


@pytest.mark.parametrize("value", [2e-4, -3.0, 12345.0])
def test_the_axis_of_a_constant_begins_at_zero(value):
    svg = chart([Line(Curve([1, 2, 3], [value] * 3), 0, "")], ylabel="learning rate")
    texts = [text.replace("\N{MINUS SIGN}", "-") for text in re.findall(r"<text[^>]*>([^<]+)</text>", svg)]
    numbers = [text for text in texts if re.fullmatch(r"-?[\d.]+", text)]
    assert any(float(number) == 0 for number in numbers) and max(map(len, numbers)) <= 7
    assert chart([Line(Curve([1, 2], [0.0, 0.0]), 0, "")], ylabel="zero").startswith("<svg")
