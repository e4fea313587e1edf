# SPDX-License-Identifier: Apache-2.0
"""`optkit report` makes a page of runs that are over."""

import pytest

from lightning_optkit.cli import main
from lightning_optkit.diagnostics import Curve, RunRecord


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, loss in (("plain", 2.0), ("fused", 1.0)):
        RunRecord(name, num_steps=2, loss=Curve([1, 2], [3.0, loss])).save(tmp_path / name / "report.json")
    return tmp_path


def test_one_run_is_summed_up_and_several_are_compared(folder, capsys):
    main(["report", "plain/report.json"])
    shown = capsys.readouterr().out
    assert "plain: 2 steps" in shown and shown.endswith(f"Report: {folder / 'report.html'}\n")
    main(["report", ".", "--output", "deep/all.html", "--title", "Both of them"])
    shown = capsys.readouterr().out
    assert "plain" in shown and "fused" in shown and "1.0000" in shown and "2.0000" in shown
    page = (folder / "deep" / "all.html").read_text()
    assert "<h1>Both of them</h1>" in page and "Loss" in page


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["none.json"], 2, "optkit report: none.json: there is no such file.\n"),
        (["plain", ""], 2, "optkit report: one of the paths is empty; is a variable of the shell not set?\n"),
        (
            ["empty.csv"],
            2,
            "optkit report: empty.csv: it is empty, as what a run leaves that ended before it logged.\n",
        ),
        (["blank.csv"], 2, "optkit report: blank.csv: it is empty, as what"),
        (["head.csv"], 2, "optkit report: head.csv: nothing was logged; it has no row but its head.\n"),
        (["broken.json"], 2, "optkit report: broken.json: it is no record of Report, or only a part of one;"),
        (["nothing"], 2, "optkit report: nothing: there is no record of Report and no metrics.csv in this folder;"),
        (["plain", "--output", "plain"], 2, "plain is a folder."),
        (
            ["plain/report.json", "--output", "./plain/report.json"],
            2,
            "it is one of the runs, and would be overwritten.",
        ),
        ([], 2, "paths"),
        (["plain", "--colour", "red"], 2, "--colour"),
    ],
)
def test_a_mistake_is_said_in_a_sentence(folder, capsys, words, status, sentence):
    before = (folder / "plain" / "report.json").read_text()
    for name, text in (("empty.csv", ""), ("blank.csv", "\n\n"), ("head.csv", "step,loss\n"), ("broken.json", "{")):
        (folder / name).write_text(text)
    (folder / "nothing").mkdir()
    with pytest.raises(SystemExit) as exit_info:
        main(["report", *words])
    assert sentence in capsys.readouterr().err and exit_info.value.code == status
    assert (folder / "plain" / "report.json").read_text() == before


def test_help_says_what_it_takes(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["report", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert exit_info.value.code == 0
    assert "optkit report lightning_logs --output all.html" in shown and "metrics.csv of CSVLogger" in shown


def test_what_cannot_be_read_in_a_folder_is_left_out_in_a_sentence(folder, capsys):
    (folder / "plain" / "report.json").write_text('{"name": "pl')  # killed while it was written
    main(["report", "."])
    captured = capsys.readouterr()
    assert "fused: 2 steps" in captured.out and captured.err.startswith("Left out: plain/report.json: it is no record")


def test_a_page_that_cannot_be_written_leaves_the_old_one(folder, monkeypatch):
    main(["report", "plain", "--output", "all.html"])
    before = (folder / "all.html").read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SystemExit, match=r"^optkit report: \[Errno 28\] No space left on device: '\S*/all\.html'$"):
        main(["report", "fused", "--output", "all.html"])
    assert (folder / "all.html").read_text() == before
    assert sorted(path.name for path in folder.iterdir()) == ["all.html", "fused", "plain"]
