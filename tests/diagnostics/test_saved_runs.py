# SPDX-License-Identifier: Apache-2.0
"""Runs are read from records, checkpoints and logs, and told apart by name."""

from dataclasses import replace

import pytest
import torch

from lightning_optkit.diagnostics import Curve, RunRecord, result_rows
from lightning_optkit.diagnostics._comparison import comparison_rows, write_comparison
from lightning_optkit.diagnostics._saved_runs import saved_runs
from lightning_optkit.diagnostics._summary import summary_text

RECORD = RunRecord("plain", num_steps=2, loss=Curve([1, 2], [2.0, 1.0]), settings={"seed": "1"})
LOG = """epoch,step,train_loss_step,val/acc,lr-AdamW,grad_norm,d_loss,note
0,0,2.5,,0.1,3.0,nan,x
0,1,1.5,,0.05,2.0,0.5,y
0,1,,0.75,,,,
"""


def test_a_record_a_checkpoint_and_a_log(tmp_path):
    RECORD.save(tmp_path / "a" / "report.json")
    state = {"callbacks": {"Report": RECORD.to_dict(), "Other": {}}, "state_dict": {}}
    torch.save(state, tmp_path / "last.ckpt")
    (tmp_path / "version_3").mkdir()
    (tmp_path / "version_3" / "metrics.csv").write_text(LOG)
    record, checkpoint, log = saved_runs(
        [tmp_path / "a" / "report.json", tmp_path / "last.ckpt", tmp_path / "version_3"]
    )
    assert record.name == "plain, a" and checkpoint.name == f"plain, {tmp_path.name}" and log.name == "version_3"
    assert record.loss == checkpoint.loss == RECORD.loss and record.settings == {"seed": "1"}
    assert log.loss == Curve([1, 2], [2.5, 1.5], num_appended=2) and log.num_steps == 2
    assert log.metrics == {"val/acc": Curve([2], [0.75], num_appended=1)}
    assert log.learning_rate["AdamW"].values == [0.1, 0.05] and log.grad_norm["optimizer 0"].values == [3.0, 2.0]
    assert log.logged.keys() == {"d_loss"} and log.logged["d_loss"].finite() == ([2], [0.5])


def test_a_folder_is_searched_and_a_record_wins_over_the_log_beside_it(tmp_path):
    RECORD.save(tmp_path / "logs" / "version_0" / "report.json")
    for version in ("version_0", "version_1"):
        (tmp_path / "logs" / version).mkdir(exist_ok=True)
        (tmp_path / "logs" / version / "metrics.csv").write_text(LOG)
    assert [run.name for run in saved_runs([tmp_path])] == ["plain", "version_1"]


def test_a_folder_has_the_records_whose_pages_have_names_of_their_own(tmp_path):
    for name in ("lr=0.1", "lr=0.01"):
        replace(RECORD, name=name).save(tmp_path / "runs" / f"{name}.json")
        (tmp_path / "runs" / f"{name}.html").write_text("<html>")
    (tmp_path / "runs" / "settings.json").write_text('{"lr": 0.1}')  # somebody else's
    said = []
    assert [run.name for run in saved_runs([tmp_path], said.append)] == ["lr=0.01", "lr=0.1"] and not said


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a/report.json", "b/report.json"], ["a", "b"]),
        (["a/out/report.json", "b/out/report.json"], ["a", "b"]),
        (["x/a/out/r.json", "x/b/out/r.json", "y/a/out/r.json"], ["x/a", "x/b", "y/a"]),
        (["out/report.json", "out/sub/report.json"], ["out", "sub"]),
        (["out/first.json", "out/lr=0.1.json"], ["first", "lr=0.1"]),
        (["a/one.json", "a/two.json", "b/one.json"], ["a/one", "a/two", "b/one"]),
    ],
)
def test_runs_of_one_name_are_told_apart_by_what_differs_in_their_paths(tmp_path, files, names):
    for file in files:
        RECORD.save(tmp_path / file)
    assert [run.name for run in saved_runs([tmp_path / file for file in files])] == names
    replace(RECORD, name="other").save(tmp_path / "other.json")
    with_other = saved_runs([*(tmp_path / file for file in files), tmp_path / "other.json"])
    assert [run.name for run in with_other] == [*(f"plain, {name}" for name in names), "other"]


def test_a_record_and_a_checkpoint_of_one_name(tmp_path):
    RECORD.save(tmp_path / "a.json")
    torch.save({"callbacks": {"Report": RECORD.to_dict()}, "state_dict": {}}, tmp_path / "a.ckpt")
    assert [run.name for run in saved_runs([tmp_path / "a.json", tmp_path / "a.ckpt"])] == ["a.json", "a.ckpt"]


def test_a_name_that_another_run_has_is_numbered(tmp_path):
    for folder, name in (("a", "plain"), ("b", "plain"), ("c", "plain, a")):
        replace(RECORD, name=name).save(tmp_path / folder / "report.json")
    assert [run.name for run in saved_runs([tmp_path])] == ["plain, a", "plain, b", "plain, a 2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, r"none\.json: there is no such file\.$"),
        ("empty", "folder", r"empty: there is no record of Report and no metrics\.csv in this folder; give"),
        ("log.csv", "a,b\n1,2\n", r"log\.csv: it has no column 'step'"),
        ("bad.ckpt", "no checkpoint", r"bad\.ckpt: it is no checkpoint that can be read safely \(\w+\)\.$"),
        ("other.ckpt", {"callbacks": {}}, r"other\.ckpt: the run had no Report among its callbacks"),
        (
            "bad.json",
            "{}",
            r"bad\.json: it is no record of Report, or only a part of one; a checkpoint of the run has it",
        ),
        ("deep.json", "[" * 100_000, r"deep\.json: it is no record of Report"),
        ("empty.csv", "", r"empty\.csv: it has no column 'step'"),
        ("head.csv", "step,loss\n", r"head\.csv: nothing was logged"),
        ("text.csv", "step,loss\na,b\n", r"text\.csv: none of its columns has a number"),
        ("wide.csv", "step,loss\n1," + "9" * 200_000, r"wide\.csv: it is no log of CSVLogger"),
        ("strange.ckpt", {"callbacks": 3}, r"strange\.ckpt: the run had no Report among its callbacks"),
        ("damaged.ckpt", {"callbacks": {"Report": {}}}, r"damaged\.ckpt: its record of Report is damaged"),
    ],
)
def test_what_holds_no_run_is_refused_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        saved_runs([path])


def seeds(*losses):
    steps = list(range(1, 41))
    return [
        RunRecord(
            f"seed {at}",
            loss=Curve(steps, [loss] * 40),
            elapsed_s=Curve(steps, [0.1 * step for step in steps]),
            metrics={"val_loss": Curve([20, 40], [loss, 2 * loss])},
            settings={"seed": str(at), "batch size": "32"},
            callbacks={"Fuse": ""} if loss < 1 else {},
        )
        for at, loss in enumerate(losses)
    ]


def test_mean_and_spread_of_each_group(tmp_path):
    groups = {"plain": seeds(1.0, 3.0), "fused": seeds(0.5, 0.5)}
    rows = {row[0]: row[1:] for row in comparison_rows(groups)}
    assert rows["training loss, last 5 %"] == ("2 +- 1.4", "0.5 +- 0")
    assert rows["val_loss, best"] == ("2 +- 1.4", "0.5 +- 0") and rows["val_loss, last"] == ("4 +- 2.8", "1 +- 0")
    assert rows["seconds"] == ("4 +- 0", "4 +- 0") and rows["runs"] == ("2", "2")
    page = write_comparison(groups, tmp_path / "c.html", title="Both").read_text()
    assert page.count("<svg") == 3 and "Loss against time" in page and "2 +- 1.4" in page
    assert "0, 1" in page and page.index("What differs") < page.index("Fuse") < page.index("Results")


def test_a_run_without_a_number_is_counted():
    broken = seeds(1.0, 2.0)
    broken[1].loss, broken[1].metrics = Curve([1], [float("nan")]), {}
    rows = {row[0]: row[1:] for row in comparison_rows({"plain": broken})}
    assert rows["training loss, last 5 %"] == ("1, 1 without a number",)


def test_the_same_file_by_two_names_is_one_run(tmp_path):
    RECORD.save(tmp_path / "a" / "report.json")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert [run.name for run in saved_runs([tmp_path / "a", tmp_path / "link" / "report.json"])] == ["plain"]


def test_a_run_that_diverged_does_not_look_as_if_it_had_learned():
    steps, nan = list(range(1, 41)), float("nan")
    lost = RunRecord(
        "lost", loss=Curve(steps, [0.1] * 20 + [nan] * 20), metrics={"val_acc": Curve([20, 40], [0.9, nan])}
    )
    fine = RunRecord("fine", loss=Curve(steps, [0.2] * 40), metrics={"val_acc": Curve([20, 40], [0.8, 2e-7])})
    rows = {row[0]: row[1:] for row in result_rows([lost, fine])}
    assert rows["training loss, last 5 %"] == ("not finite", "0.2000")
    assert rows["val_acc, last"] == ("not finite", "2e-07")
    rows = {row[0]: row[1:] for row in comparison_rows({"lost": [lost], "half": [lost, fine]})}
    assert rows["training loss, last 5 %"] == ("not finite", "0.2, 1 without a number")
    assert rows["val_acc, last"][0] == "not finite"
    assert "0.1, constant, then not finite" in summary_text(lost)


@pytest.mark.parametrize("name", ["val_loss", "test_acc", "accuracy"])
def test_logs_of_a_validation_or_test_are_no_runs_of_a_folder(tmp_path, name):
    for version, log in (("version_0", LOG), ("version_1", f"epoch,step,{name}\n0,0,0.5\n")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "metrics.csv").write_text(log)
    said = []
    assert [run.name for run in saved_runs([tmp_path], said.append)] == ["version_0"]
    assert len(said) == 1 and "version_1" in said[0] and "no training step" in said[0]
    (given,) = saved_runs([tmp_path / "version_1" / "metrics.csv"])  # who names the file wants it
    assert given.name == "version_1"
    with pytest.raises(ValueError, match="no training step"):
        saved_runs([tmp_path / "version_1"])


@pytest.mark.parametrize(
    "rows", ["train_loss\n0,0,0.5", "lr-SGD\n0,0,0.5", "val_loss\n0,0,0.5\n1,9,0.4", "val_loss\n0,9,0.5"]
)
def test_a_log_of_a_short_fit_is_a_run(tmp_path, rows):
    (tmp_path / "metrics.csv").write_text(f"epoch,step,{rows}\n")
    assert len(saved_runs([tmp_path])) == 1
