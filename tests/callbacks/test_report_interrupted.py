# SPDX-License-Identifier: Apache-2.0
"""A fit that an exception ends has its page: what ended it, when, where, and what was seen until then."""

import os
import pickle
import signal
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_optkit.callbacks import Fuse, GradientHealth, Report, _page_of_run
from lightning_optkit.callbacks import report as report_module
from lightning_optkit.callbacks._pending_values import PendingValues
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.interruption import how_it_ended
from lightning_optkit.diagnostics import RunRecord

pytestmark = pytest.mark.filterwarnings("ignore")


class Fails(Callback):
    """Calls `act` within the batch of this epoch and number, before its step, or in the second validation."""

    def __init__(self, act, at=(1, 2), validation=False):
        self.act, self.at, self.validation = act, at, validation

    def on_before_backward(self, trainer, pl_module, loss):
        if not self.validation and (trainer.current_epoch, trainer.fit_loop.batch_idx) == self.at:
            self.act()

    def on_validation_batch_end(self, trainer, *args):
        if self.validation and trainer.global_step > 2:
            self.act()


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def raises(error):
    def act():
        raise error

    return act


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def ended(regression, fit, tmp_path):
    """ended(error, *callbacks, act): the record and the page of a fit that ended by this error."""

    def ended_(error, *callbacks, act=None, report=None, **kwargs):
        report = report or Report(tmp_path / "report.html", verbose=False)
        failing = Fails(act or raises(error), validation=kwargs.pop("validation", False), at=kwargs.pop("at", (1, 2)))
        kind = SystemExit if isinstance(error, KeyboardInterrupt) else error if isinstance(error, type) else type(error)
        with pytest.raises(kind) as caught:
            fit(kwargs.pop("module", None) or regression(sgd), *callbacks, report, failing, **kwargs)
        if isinstance(error, Exception):
            assert caught.value is error  # the very object, not one that took its place
        path = tmp_path / "report.html"
        return report.record, path.read_text() if path.exists() else None

    return ended_


@pytest.mark.parametrize("fused", [False, True])
def test_an_exception_in_training(ended, tmp_path, fused):
    record, page = ended(RuntimeError("shapes <4, 2> do not fit"), *[Fuse(verbose=False)] * fused)
    assert record.ended["by"] == "RuntimeError: shapes <4, 2> do not fit"
    assert record.ended["when"] == "in training, after 3 steps, in epoch 2 of 3"
    assert record.ended["where"].endswith("in act: raise error") and "test_report_interrupted.py:" in str(record.ended)
    assert record.num_steps == 3 and record.loss.steps == [1, 2, 3] and "training step" in record.timings
    assert RunRecord.load(tmp_path / "report.json") == record
    assert (
        page.index("Ended before its time") < page.index("shapes &lt;4, 2&gt; do not fit") < page.index("<h2>Results")
    )


def test_an_exception_in_validation(ended):
    record, page = ended(ValueError("no such metric"), validation=True, limit_val_batches=1.0)
    assert record.ended["when"] == "in validation, after 4 steps, in epoch 2 of 3"
    assert record.metrics["val_loss"].steps == [2] and "Ended in validation" in page


def test_ctrl_c_and_sigterm(ended):
    record, page = ended(KeyboardInterrupt())
    assert record.ended["by"] == "KeyboardInterrupt (Ctrl-C)" and "Ctrl-C" in page
    before = signal.getsignal(signal.SIGTERM)
    record, page = ended(SIGTERMException, act=terminate)
    assert record.ended["by"] == "SIGTERM" and "by<" in page and signal.getsignal(signal.SIGTERM) == before


def test_a_fit_that_comes_to_its_end_says_nothing_of_it(regression, fit, ended, tmp_path):
    _, page = ended(RuntimeError("once"))
    report = Report(tmp_path / "report.html", verbose=False)
    fit(regression(sgd), report)
    page = (tmp_path / "report.html").read_text()
    assert report.record.ended == {} and "Ended before" not in page and "ended by" not in page


@pytest.mark.parametrize("order", [1, -1])
def test_the_verdicts_are_those_of_the_last_step(regression, fit, tmp_path, order):
    """A loss that is not finite is seen before the exception that it leads to, and concluded only after it."""
    report, health = Report(tmp_path / "report.html", verbose=False), GradientHealth(verbose=False)
    module = regression(sgd, poisoned=[(2, 1)])
    with pytest.raises(RuntimeError, match="loss is inf"):
        fit(module, *[report, health][::order], Fails(raises(RuntimeError("loss is inf")), at=(2, 1)))
    assert [each.symptom for each in report.record.verdicts] == ["nonfinite"] and health.verdicts
    assert "<b>nonfinite</b>" in (tmp_path / "report.html").read_text()


def test_a_run_that_fails_before_its_first_step_leaves_the_page_of_another_alone(regression, fit, ended, tmp_path):
    fit(regression(sgd), Report(tmp_path / "report.html", verbose=False))
    before = (tmp_path / "report.html").read_bytes()
    record, page = ended(RuntimeError("first batch"), at=(0, 0))
    assert record.ended["when"].startswith("in training, after 0 steps") and page.encode() == before


def test_what_fails_outside_of_a_fit_is_not_written(regression, fit, make_trainer, tmp_path, data):
    report = Report(tmp_path / "report.html", verbose=False)
    trainer = fit(regression(sgd), report)
    (tmp_path / "report.html").unlink()
    module = regression(sgd)
    module.validation_step = raises(RuntimeError("elsewhere"))
    trainer.limit_val_batches = 1.0
    with pytest.raises((RuntimeError, TypeError)):
        trainer.validate(module, data())
    assert not (tmp_path / "report.html").exists() and report.record.ended == {}


@pytest.mark.parametrize("what", ["the page", "the values", "the verdicts", "the text", "the undo"])
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_nothing_takes_the_place_of_the_exception(ended, monkeypatch, tmp_path, what, action):
    error = KeyError("mine")

    def breaks(*args, **kwargs):
        raise RuntimeError("CUDA error: device-side assert triggered")

    def act():
        warnings.simplefilter(action)  # "error": a warning of ours would be an exception too
        owner, name = {
            "the page": (_page_of_run, "write_report"),
            "the values": (PendingValues, "fetch"),
            "the verdicts": (GradientHealth, "_conclude"),
            "the text": (report_module, "how_it_ended"),
            "the undo": (Report, "_release"),
        }[what]
        monkeypatch.setattr(owner, name, breaks)
        raise error

    with warnings.catch_warnings():
        _, page = ended(error, GradientHealth(verbose=False), act=act)
    assert (page is None) == (what in ("the page", "the text"))
    assert (tmp_path / "report.json").exists() == (what != "the text")  # written first: the page may never be whole


def test_an_undo_that_fails_does_not_take_its_place(ended):
    class Careless(FitCallback):
        def on_fit_start(self, trainer, pl_module):
            self._at_end(lambda: 1 / 0)

        def _forget(self):
            pass

    with pytest.warns(UserWarning, match=r"^Careless: not all of its changes could be undone after the KeyError"):
        ended(KeyError("mine"), Careless())


def test_a_checkpoint_on_the_exception_holds_it_and_a_resumed_run_does_not(regression, fit, ended, tmp_path):
    report = Report(tmp_path / "report.html", verbose=False)
    last = OnExceptionCheckpoint(tmp_path, "left")
    with pytest.raises(RuntimeError):
        fit(regression(sgd), report, last, Fails(raises(RuntimeError("once"))), enable_checkpointing=True)
    saved = torch.load(tmp_path / "left.ckpt", weights_only=True)["callbacks"]["Report"]
    assert saved["ended"]["by"] == "RuntimeError: once"
    resumed = Report(tmp_path / "report.html", verbose=False)
    fit(regression(sgd), resumed, ckpt_path=tmp_path / "left.ckpt")
    assert resumed.record.ended == {} and resumed.record.num_steps == 6


def test_a_second_fit_with_the_same_callback(regression, fit, ended):
    record, _ = ended(RuntimeError("once"), report=(report := Report(write=False, verbose=False)))
    assert record.ended
    fit(regression(sgd), report, epochs=1)
    assert report.record.ended == {} and report.record.loss.steps == [1, 2]
    assert pickle.loads(pickle.dumps(report)).record == report.record


def test_the_terminal_says_it_too(ended, printed, tmp_path):
    ended(RuntimeError("\x1b[31mred " * 200), report=Report(tmp_path / "report.html"))
    said = printed()
    summary, found, _ = said[said.index("Regression: 3 steps") :].partition("\nReport: ")
    lines = summary.splitlines()
    assert lines[1].startswith("Ended in training, after 3 steps, in epoch 2 of 3, by RuntimeError:")
    assert max(map(len, lines)) <= 80 and "\x1b" not in said and found


@pytest.mark.parametrize("trial", [{"fast_dev_run": True}, {"epochs": 0}, {"limit_train_batches": 0}], ids=str)
def test_what_is_no_run_leaves_the_page_of_another_alone(regression, fit, tmp_path, trial):
    report = Report(tmp_path / "report.html", verbose=False)
    fit(regression(sgd), report, epochs=1)
    before = [path.read_bytes() for path in sorted(tmp_path.glob("report*"))]
    fit(regression(sgd), report, **trial)
    assert [path.read_bytes() for path in sorted(tmp_path.glob("report*"))] == before and len(before) == 2


class Strange(Exception):
    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "by"),
    [
        (Strange(), "Strange: <exception str() failed>"),
        (RuntimeError("Caught in a worker\n" + "x" * 5000 + "\nKeyError: 3"), "RuntimeError: Caught in a worker\n"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_any_exception_has_a_text(ended, error, by):
    record, _ = ended(error, report=Report(write=False, verbose=False))
    assert record.ended["by"].startswith(by) or record.ended["by"].split(".")[-1].startswith(by)
    assert len(record.ended["by"]) < 2100
    if "worker" in by:
        assert record.ended["by"].endswith("KeyError: 3")


def test_the_line_is_the_users(regression, ended):
    def training_step(batch, batch_idx):
        return torch.nn.functional.linear(batch[0], torch.ones(3, 3)).sum()

    module = regression(sgd)
    took = module.training_step
    module.training_step = lambda batch, batch_idx: (took if module.global_step < 2 else training_step)(
        batch, batch_idx
    )
    with pytest.raises(RuntimeError) as caught:
        ended(KeyError(), report=(report := Report(write=False, verbose=False)), module=module)
    assert report.record.ended["by"].splitlines()[0] == f"RuntimeError: {caught.value}".splitlines()[0]
    assert "in training_step: return torch.nn.functional.linear" in report.record.ended["where"]


def test_no_other_process_is_asked(ended, monkeypatch):
    """A collective would wait for ever where only one process fails."""

    class Spy(Callback):
        def on_exception(self, trainer, pl_module, exception):
            for name in ("broadcast", "barrier", "reduce", "all_gather", "reduce_boolean_decision"):
                monkeypatch.setattr(trainer.strategy, name, lambda *_, name=name, **__: pytest.fail(name))

    record, page = ended(RuntimeError("here only"), Spy(), GradientHealth(verbose=False))
    assert record.ended and page


def test_only_the_first_process_writes(ended, monkeypatch):
    monkeypatch.setattr(pl.Trainer, "is_global_zero", property(lambda trainer: False))
    record, page = ended(RuntimeError("elsewhere"))
    assert record.ended and page is None


def test_it_takes_no_frame_of_an_exception_that_was_never_raised(make_trainer, regression, data):
    trainer = make_trainer(epochs=1)
    trainer.fit(regression(sgd), data())
    assert how_it_ended(trainer, RuntimeError("x"))["where"] == ""
