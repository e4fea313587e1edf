# SPDX-License-Identifier: Apache-2.0
"""What Report writes and prints, where, and what happens if it cannot."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from report_cases import STEPS, adamw, only_record, plain_sgd

from lightning_optkit.callbacks import Report, _page_of_run
from lightning_optkit.diagnostics import RunRecord


def test_writes_the_file_and_says_where(regression, fit, tmp_path, printed):
    path = tmp_path / "deep" / "run.html"
    fit(regression(adamw), Report(path, name="my run"))
    assert f"Report: {path}" in printed()
    page = path.read_text()
    assert "my run" in page and "<td>6</td>" in page and page.count("<svg") >= 3


def test_writes_beside_the_logs_unless_told_otherwise(regression, fit, tmp_path):
    fit(regression(adamw), Report(), logger=CSVLogger(tmp_path, name="logs", version=1), log_every_n_steps=1)
    assert "Regression" in (tmp_path / "logs" / "version_1" / "report.html").read_text()
    fit(regression(adamw), Report())
    assert (tmp_path / "report.html").exists()


def test_only_rank_zero_writes(regression, fit, tmp_path, monkeypatch):
    monkeypatch.setattr(pl.Trainer, "is_global_zero", property(lambda trainer: False))
    fit(regression(adamw), Report(tmp_path / "report.html"))
    assert not (tmp_path / "report.html").exists()


def test_only_recording_writes_nothing(regression, fit, tmp_path, printed):
    fit(regression(adamw), Report(tmp_path / "report.html", write=False))
    assert not (tmp_path / "report.html").exists() and "Report:" not in printed()


@pytest.mark.parametrize(
    ("path", "needed"),
    [("run.json", "must be that of the page"), ("lr=0.1", r"must end in \.html, such as '.*lr=0\.1\.html'\.$")],
)
def test_a_page_is_one_that_a_browser_opens(tmp_path, path, needed):
    with pytest.raises(ValueError, match=rf"^Report\(path='.*{path}'\): path {needed}"):
        Report(tmp_path / path)


@pytest.mark.parametrize("reason", ["drawing", "writing"])
def test_a_report_that_fails_ends_no_fit(regression, fit, tmp_path, monkeypatch, reason):
    path = tmp_path / "report.html"
    if reason == "drawing":
        monkeypatch.setattr(_page_of_run, "write_report", lambda *_: 1 / 0)
    else:
        path = tmp_path / "file" / "report.html"
        path.parent.write_text("in the way")
    module = regression(plain_sgd)
    with pytest.warns(
        UserWarning,
        match=r"Report\(path='.*report\.html'\): no report (was written \(\w+Error: |can be written at the)",
    ) as caught:
        fit(module, report := Report(path))
    assert report.record.num_steps == STEPS[-1]
    assert "\n" not in str(caught[0].message)


def test_the_record_lies_beside_the_page(regression, fit, tmp_path):
    fit(regression(adamw), report := Report(tmp_path / "run.html"))
    assert RunRecord.load(tmp_path / "run.json") == report.record
    assert report.record.environment["torch"].startswith(torch.__version__)


@pytest.mark.parametrize("verbose", [True, False])
def test_a_summary_is_printed_when_the_fit_ends(regression, fit, printed, verbose):
    fit(regression(adamw), only_record(name="mine", verbose=verbose))
    assert ("mine: 6 steps in" in printed()) == verbose
