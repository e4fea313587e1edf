# SPDX-License-Identifier: Apache-2.0
"""`optkit plot-schedule` shows the factors of the schedule it names, and draws them."""

import io

import pytest

import lightning_optkit as ok
from lightning_optkit.cli import main


def rows(text):
    found = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]
    return {int(row[0].replace(",", "")): float(row[1]) for row in found}


def test_the_table_has_the_values_of_the_schedule(capsys):
    main(["plot-schedule", "warmup_cosine", "--warmup", "0.1", "--total_steps", "2001", "--base", "0.01"])
    shown = rows(capsys.readouterr().out)
    assert list(shown) == [200 * row for row in range(11)]
    schedule = ok.schedules.warmup_cosine(0.1)
    assert shown == {step: pytest.approx(0.01 * schedule(step, 2001), rel=1e-3) for step in shown}


def test_a_schedule_inside_another(capsys):
    words = ["--schedule", "lightning_optkit.schedules.cosine", "--schedule.min_factor", "0.5", "--steps", "10"]
    main(["plot-schedule", "warmup", *words, "--total_steps", "100"])
    text = capsys.readouterr().out
    assert "warmup(schedule=cosine(min_factor=0.5, steps=1.0), steps=10" in " ".join(text.split())
    assert rows(text)[99] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("prefix", ["", "lightning_optkit.schedules."])
@pytest.mark.parametrize("joint", [[], ["="]], ids=["two words", "one word"])
def test_schedules_inside_another_have_short_names(capsys, prefix, joint):
    inner = [("--schedule", "join"), ("--schedule.a", "linear"), ("--schedule.b", "constant")]
    words = [
        word for option, name in inner for word in ([f"{option}={prefix}{name}"] if joint else [option, prefix + name])
    ]
    main(["plot-schedule", "warmup", *words, "--schedule.at", "0.5", "--steps", "10", "--total_steps", "100"])
    assert "warmup(schedule=join(a=linear(" in "".join(capsys.readouterr().out.split())


def test_a_terminal_without_bars(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    main(["plot-schedule", "cosine"])
    assert "|    0 |         1 | ????" in written.getvalue().decode("ascii")


def test_it_draws_into_a_folder_that_it_creates(tmp_path, capsys):
    main(["plot-schedule", "cosine", "--output", str(tmp_path / "drawn/cosine.svg")])
    assert (tmp_path / "drawn/cosine.svg").read_text().startswith("<?xml")
    assert f"Drawn: {tmp_path / 'drawn/cosine.svg'}" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("name", ["s.xyz", "s", "s.html"])
def test_a_file_of_another_kind_is_refused_before_the_table(tmp_path, capsys, name):
    with pytest.raises(SystemExit) as exit_info:
        main(["plot-schedule", "cosine", "--output", str(tmp_path / name)])
    out, said = capsys.readouterr()
    assert exit_info.value.code == 2 and ".svg" in said
    assert said.startswith(f"optkit plot-schedule: --output {tmp_path / name}: the name must end in one of .")
    assert out == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["cosine", "--min_factor", "2"], "plot-schedule: --min_factor 2.0: min_factor must be in [0, 1]."),
        (
            ["warmup", "--steps=9", "--schedule=lightning_optkit.schedules.cosine", "--schedule.min_factor=2"],
            "plot-schedule: cosine(min_factor=2.0): min_factor must be in [0, 1].",  # its option has another name
        ),
        (["cosine", "--total_steps", "0"], "plot-schedule: --total_steps 0: total_steps must be an integer >= 1."),
        (["cosine", "--base", ".nan"], "plot-schedule: --base nan: base must be in (0, inf)."),
        (
            ["cosine", "--output", "/dev/null/a.svg"],
            "plot-schedule: --output /dev/null/a.svg: /dev/null is a file, not a folder.",
        ),
        (["cosin"], "Near it: cosine."),
        (["cosine", "--min_factor", "low"], "error: argument --min_factor: low is no float."),
        (
            ["join", "--a", "cosin", "--at", "0.5", "--b", "constant"],
            "plot-schedule: --a cosin: there is no such schedule. Near it: cosine.",
        ),
        (
            ["warmup", "--schedule=lightning_optkit.schedules.rexx", "--steps", "5"],
            "plot-schedule: --schedule lightning_optkit.schedules.rexx: there is no such schedule. Near it: rex.",
        ),
        (
            ["warmup", "--schedule", "0.5", "--steps", "5"],
            "plot-schedule: --schedule 0.5: there is no such schedule. There are constant, cosine, exponential, "
            "inverse_sqrt, inverse_time, join, linear, natural_exponential, one_cycle, piecewise_constant, polynomial, "
            "rex, sgdr, triangular, warmup, warmup_cosine, warmup_stable_decay.",
        ),
        ([], "error: the schedule is missing; one of constant, cosine, exponential, inverse_sqrt, inverse_time, ..."),
        (["warmup"], "error: the following arguments are required: --schedule, --steps"),
    ],
)
def test_a_mistake_is_said_in_a_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["plot-schedule", *words])
    out, said = capsys.readouterr()
    assert said.splitlines()[-1].endswith(sentence) and out == ""
