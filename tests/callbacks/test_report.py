# SPDX-License-Identifier: Apache-2.0
"""The record contains what each optimizer step saw, is free where the step provides it, and has no side effects."""

import itertools
import math
import pickle
import re
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import (
    ExactAccumulation,
    Fuse,
    GradientHealth,
    NoiseScale,
    Report,
    WeightAveraging,
    _gradient_norms,
    _page_of_run,
    _pending_values,
)
from lightning_optkit.callbacks import report as report_module
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.diagnostics import RunRecord
from lightning_optkit.optimizers import AdamW
from lightning_optkit.step import OnePassOptimizer

CLIP = 0.05  # below every norm of this problem
STEPS = [1, 2, 3, 4, 5, 6]
ONLY = "optimizer 0"  # the name of the optimizer of a whole module


def adamw(module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def plain_sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def only_record(**kwargs):
    return Report(write=False, **{"measure_every": 1, **kwargs})


class Seen(Callback):
    """The expected record, collected in hooks that Report does not use."""

    def __init__(self):
        self.losses, self.norms = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(2 * float(outputs["loss"]))  # Lightning divides by accumulate_grad_batches

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()])))


@pytest.fixture
def reference(regression, fit):
    """An unfused run with a clip, and what it saw."""
    seen = Seen()
    fit(regression(adamw), seen, gradient_clip_val=CLIP)
    return seen


def test_the_loss_of_a_step_is_the_mean_of_its_batches(regression, fit, reference):
    report = only_record()
    fit(regression(adamw), report, gradient_clip_val=CLIP)
    pairs = zip(reference.losses[::2], reference.losses[1::2], strict=True)
    assert report.record.loss.steps == STEPS and report.record.num_steps == 6
    assert report.record.loss.values == pytest.approx([(a + b) / 2 for a, b in pairs], rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_the_learning_rate_is_the_one_the_step_used(regression, fit, fused):
    report = only_record()
    fit(regression(adamw), *[Fuse(verbose=False)] * fused, report)
    assert report.record.learning_rate.keys() == {"group 0"}
    rates = report.record.learning_rate["group 0"]
    assert rates.steps == STEPS and rates.values == pytest.approx([0.1 / step for step in STEPS])


def test_groups_are_called_by_their_names(regression, fit):
    def configure(module):
        named = [
            {"params": module.net[0].parameters(), "name": "body"},
            {"params": module.net[2].parameters(), "lr": 0.3},
        ]
        return torch.optim.SGD(named, lr=0.1)

    report = only_record()
    fit(regression(configure), report)
    assert {name: curve.values[-1] for name, curve in report.record.learning_rate.items()} == {
        "body": 0.1,
        "group 1": 0.3,
    }


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("callbacks", [(), (Fuse,)], ids=["unfused", "fused"])
def test_the_gradient_norm_is_known_before_and_after_clipping(regression, fit, precision, callbacks):
    expected, report = Seen(), only_record()
    fit(regression(adamw), expected, gradient_clip_val=CLIP, precision=precision)
    fit(
        regression(adamw),
        *[make(verbose=False) for make in callbacks],
        report,
        gradient_clip_val=CLIP,
        precision=precision,
    )
    assert report.record.grad_norm[ONLY].steps == STEPS
    assert report.record.grad_norm[ONLY].values == pytest.approx(expected.norms, rel=1e-4)
    assert report.record.grad_norm_clipped[ONLY].steps == STEPS
    assert report.record.grad_norm_clipped[ONLY].values == pytest.approx([CLIP] * 6, rel=1e-3)
    assert min(expected.norms) > CLIP


def test_leaves_the_folded_unscaling_in_place(regression, fit):
    folded = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            folded.append(trainer.optimizers[0]._step_supports_amp_scaling)

    fit(regression(adamw), only_record(), Fuse(verbose=False), Watch(), gradient_clip_val=CLIP, precision="16-mixed")
    assert folded and all(folded)


@pytest.mark.parametrize("order", [1, -1])
def test_a_step_that_knows_its_norm_is_never_measured_again(regression, fit, monkeypatch, order):
    monkeypatch.setattr(_gradient_norms, "_grad_norm", lambda *args: pytest.fail("measured"))
    report = only_record()
    fit(regression(adamw), *[report, Fuse(verbose=False)][::order], gradient_clip_val=CLIP)
    assert report.record.grad_norm[ONLY].steps == report.record.grad_norm_clipped[ONLY].steps == STEPS


def test_other_steps_are_measured_only_now_and_then(regression, fit, monkeypatch):
    measured, measure = [], _gradient_norms._grad_norm
    monkeypatch.setattr(_gradient_norms, "_grad_norm", lambda *args: measured.append(args) or measure(*args))
    report = only_record(measure_every=4)
    fit(regression(adamw), report)
    assert report.record.grad_norm[ONLY].steps == [1, 5] and len(measured) == 2  # nothing clips: no second look
    assert report.record.grad_norm_clipped == {}
    fit(regression(adamw), report, gradient_clip_val=CLIP)
    assert (
        report.record.grad_norm[ONLY].steps == report.record.grad_norm_clipped[ONLY].steps == [1, 5]
        and len(measured) == 6
    )


def test_a_folded_clip_by_value_is_measured_before_it_only(regression, fit, reference):
    report = only_record()
    clip = dict(gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    seen = Seen()
    fit(regression(adamw), report, Fuse(verbose=False), seen, **clip)
    assert report.record.grad_norm[ONLY].steps == STEPS
    assert report.record.grad_norm[ONLY].values == pytest.approx(seen.norms, rel=1e-5)
    assert report.record.grad_norm[ONLY].values[0] == pytest.approx(reference.norms[0], rel=1e-5)
    assert report.record.grad_norm_clipped == {}  # the step never writes the gradients


def test_a_last_window_that_is_not_full_is_a_step_too(regression, fit):
    report = only_record()
    fit(regression(plain_sgd), report, accumulate_grad_batches=3, epochs=1)  # 4 batches: 3 and 1
    assert report.record.loss.steps == report.record.grad_norm[ONLY].steps == [1, 2]


def test_losses_are_whole_where_batches_are_weighted(regression, fit):
    plain, weighted = only_record(), only_record()
    fit(regression(plain_sgd), plain)
    fit(regression(plain_sgd), weighted, ExactAccumulation())
    assert weighted.record.loss.values == pytest.approx(plain.record.loss.values, rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_has_no_norm(regression, fit, fused):
    report = only_record()
    module = regression(adamw, poisoned=[(1, 0)])
    fit(module, *[Fuse(verbose=False)] * fused, report, gradient_clip_val=CLIP, precision="16-mixed")
    steps, norms = report.record.grad_norm[ONLY].finite()
    assert 3 not in steps and len(steps) >= 3 and min(norms) > 0
    assert 3 not in report.record.grad_norm_clipped[ONLY].finite()[0]
    assert math.isinf(report.record.loss.values[2])


def test_sparse_gradients_are_measured(make_trainer):
    class Words(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 2, sparse=True)

        def training_step(self, batch, batch_idx):
            return self.table(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    report = only_record()
    make_trainer(report, epochs=1, accumulate_grad_batches=1).fit(
        Words(), DataLoader([torch.tensor([1, 1, 2])], batch_size=None)
    )
    assert report.record.grad_norm[ONLY].values == pytest.approx([math.sqrt(2 * 2**2 + 2 * 1**2)])


def test_validation_metrics_and_no_others(regression, fit):
    class Extra(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            pl_module.log("after_the_epoch", 1.0)

    report = only_record()
    trainer = fit(regression(adamw), report, Extra(), limit_val_batches=1.0, num_sanity_val_steps=2)
    assert {"train_loss", "after_the_epoch"} <= trainer.callback_metrics.keys()
    assert report.record.metrics.keys() == {"val_loss"}
    assert report.record.metrics["val_loss"].steps == [2, 4, 6]
    assert report.record.metrics["val_loss"].values[-1] == pytest.approx(float(trainer.callback_metrics["val_loss"]))


def test_step_times_count_every_batch_and_no_validation(regression, fit, monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(report_module, "time", clock)

    class Tick(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            clock.now += 1.0

        def on_validation_epoch_start(self, trainer, pl_module):
            clock.now += 100.0

        def on_train_epoch_end(self, trainer, pl_module):
            clock.now += 100.0

    report = only_record()
    fit(regression(plain_sgd), report, Tick(), limit_val_batches=1.0, val_check_interval=2)
    assert report.record.step_ms.steps == STEPS and report.record.step_ms.values == [2000.0] * 6
    assert report.record.timings == {"training step": 2000.0}


def test_the_plan_is_the_one_of_the_running_fit(regression, fit):
    report = only_record()
    fit(regression(adamw), report, WeightAveraging(EMA(0.9)), Fuse(verbose=False), gradient_clip_val=CLIP)
    for stage in ("ClipNorm(max_norm=0.05)", "update", "EMA(decay=0.9"):
        assert stage in report.record.explanation
    fit(regression(adamw), report)
    assert report.record.explanation == "torch.optim.adamw.AdamW: its own step; nothing is folded into it"


def test_changes_no_bit_of_the_training(regression, fit, frozen):
    weights = []
    for callbacks in ([], [only_record()]):
        module = regression(adamw)
        fit(module, *callbacks, gradient_clip_val=CLIP)
        weights.append(frozen(list(module.parameters())))
    assert weights[0] == weights[1]


@pytest.mark.parametrize("fused", [False, True])
def test_a_resumed_run_has_the_record_of_the_whole_run(regression, fit, tmp_path, fused):
    def callbacks(report):
        return [*[Fuse(verbose=False)] * fused, report]

    kwargs = dict(gradient_clip_val=CLIP, limit_val_batches=1.0)
    whole, first, second = only_record(), only_record(), only_record()
    fit(regression(adamw), *callbacks(whole), **kwargs)

    def saving():
        return ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)

    fit(regression(adamw), *callbacks(first), saving(), epochs=1, enable_checkpointing=True, **kwargs)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert saved["callbacks"]["Report"]["num_steps"] == 2
    kwargs |= dict(enable_checkpointing=True, ckpt_path=tmp_path / "epoch=0.ckpt")
    fit(regression(adamw), *callbacks(second), saving(), **kwargs)
    for name in ("loss", "grad_norm", "grad_norm_clipped", "learning_rate", "num_steps"):
        assert getattr(second.record, name) == getattr(whole.record, name), name
    assert second.record.metrics["val_loss"].steps == whole.record.metrics["val_loss"].steps


def test_a_second_fit_starts_a_new_record(regression, fit):
    report = only_record()
    for _ in range(2):
        fit(regression(adamw), report, epochs=1)
    assert report.record.loss.steps == [1, 2]


def test_manual_optimization_with_two_optimizers(make_trainer, data):
    class Two(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

        def training_step(self, batch, batch_idx):
            for optimizer, net in zip(self.optimizers(), (self.a, self.b), strict=True):
                optimizer.zero_grad()
                loss = net(batch[0]).square().mean()
                self.manual_backward(loss)
                if net is self.a:
                    self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
                optimizer.step()
            return {"loss": loss}

        def configure_optimizers(self):
            return [torch.optim.SGD(self.a.parameters(), lr=0.1), torch.optim.SGD(self.b.parameters(), lr=0.2)]

    report = only_record()
    make_trainer(report, epochs=1, accumulate_grad_batches=1).fit(Two(), data())
    rates = {name: curve.values for name, curve in report.record.learning_rate.items()}
    assert rates == {"a": [0.1] * 4, "b": [0.2] * 4}
    assert report.record.num_steps == 4 and len(report.record.loss.steps) == 4
    assert report.record.grad_norm == {}  # a backward pass does not say whose it is
    assert report.record.grad_norm_clipped["a"].values == pytest.approx([CLIP] * 4, rel=1e-3)
    assert min(report.record.grad_norm_clipped["b"].values) > CLIP


@pytest.mark.parametrize("ends_by", ["the end", "an exception"])
def test_leaves_no_hook_behind(regression, fit, ends_by):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert self.optimizer(trainer)._optimizer_step_post_hooks
            if ends_by == "an exception" and batch_idx == 1:
                raise RuntimeError("stop")

        def optimizer(self, trainer):
            self.seen = trainer.optimizers[0]
            return self.seen

    stop = Stop()
    if ends_by == "the end":
        fit(regression(adamw), only_record(), stop)
    else:
        with pytest.raises(RuntimeError, match="stop"):
            fit(regression(adamw), only_record(), stop)
    assert not stop.seen._optimizer_step_post_hooks


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


def test_values_on_an_accelerator_are_fetched_together(monkeypatch):
    report, fetched = only_record(), []
    monkeypatch.setattr(_pending_values, "_MOST", 4)
    stack = torch.stack
    monkeypatch.setattr(_pending_values.torch, "stack", lambda tensors: fetched.append(len(tensors)) or stack(tensors))

    class OnAccelerator(torch.Tensor):
        device = torch.device("cuda")

        def to(self, device):
            return self.as_subclass(torch.Tensor)

    for step in range(1, 11):
        report._values.append(report.record.loss, step, torch.tensor(float(step)).as_subclass(OnAccelerator))
    assert fetched == [4, 4] and report.record.loss.steps == list(range(1, 9))
    assert len(report.state_dict()["loss"]["steps"]) == 10 and fetched == [4, 4, 2]
    assert report.record.loss.values == [float(step) for step in range(1, 11)]


def test_can_be_pickled(regression, fit):
    report = only_record()
    fit(regression(adamw), report)
    assert pickle.loads(pickle.dumps(report)).record == report.record


@pytest.mark.parametrize(
    ("path", "needed"),
    [("run.json", "must be that of the page"), ("lr=0.1", r"must end in \.html, such as '.*lr=0\.1\.html'\.$")],
)
def test_a_page_is_one_that_a_browser_opens(tmp_path, path, needed):
    with pytest.raises(ValueError, match=rf"^Report\(path='.*{path}'\): path {needed}"):
        Report(tmp_path / path)


def test_rejects_a_measurement_interval_out_of_range():
    with pytest.raises(ValueError, match=r"^Report\(measure_every=0\): measure_every must be an integer >= 1\.$"):
        Report(measure_every=0)


def test_an_optimizer_with_its_own_clip_is_read_without_fuse(regression, fit, reference):
    def configure(module):
        return AdamW(module.parameters(), lr=0.1, clip=ClipNorm(CLIP))

    report = only_record()
    trainer = fit(regression(configure), report)
    assert isinstance(trainer.optimizers[0], OnePassOptimizer)
    assert report.record.grad_norm[ONLY].values[0] == pytest.approx(reference.norms[0], rel=1e-5)


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


@pytest.mark.parametrize("state", [None, {}, {"name": 3}, [], {"loss": {}}], ids=str)
def test_a_damaged_state_is_refused_by_name(state):
    report = Report()
    before = report.record
    with pytest.raises((TypeError, ValueError), match=r"^Report\.load_state_dict\(state_dict"):
        report.load_state_dict(state)
    assert report.record is before


def test_a_method_that_lightning_adds_to_callbacks_is_no_setting(regression, fit):
    report = only_record()
    fit(regression(adamw), report, NoiseScale(every=1, verbose=False))
    assert report.record.callbacks["NoiseScale"] == "every=1"
    report = only_record()
    fit(regression(adamw), report, NoiseScale(every=1, log=False, verbose=False))
    assert report.record.callbacks["NoiseScale"] == "every=1, log=False"


def test_settings_and_callbacks_are_those_of_the_run(regression, fit, monkeypatch):
    pl.seed_everything(5, verbose=False)
    report = only_record()
    stop = EarlyStopping("val_loss", patience=7)
    average = WeightAveraging(EMA(0.9))
    fit(regression(adamw), report, average, stop, Fuse(verbose=False), gradient_clip_val=CLIP, limit_val_batches=1.0)
    settings = report.record.settings
    expected = {
        "module": "Regression",
        "parameters": "58",
        "seed": "5",
        "batch size": "2 x 2 accumulated = 4",
        "epochs": "3, 6 steps",
        "precision": "32-true",
        "gradient clip of the Trainer": "ClipNorm(max_norm=0.05)",
        "device": "cpu, 1 process",
        "optimizer": "AdamW(lr=0.1), in one pass",
        "schedulers": "LambdaLR each step",
    }
    assert expected.items() <= settings.items()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", settings["date"])
    assert report.record.callbacks == {
        "WeightAveraging": "average=EMA(decay=0.9, start=1, every=1)",
        "EarlyStopping": "monitor='val_loss', patience=7, check_on_train_epoch_end=True",  # which it decides itself
        "Fuse": "",
    }
    assert report.record.goals == {"val_loss": "min"} and report.record.clip == "ClipNorm(max_norm=0.05)"
    monkeypatch.delenv("PL_GLOBAL_SEED")
    torch.manual_seed(11)
    fit(regression(adamw), report)
    assert report.record.settings["seed"] == "11, of torch alone"


def test_what_the_training_step_logs_is_recorded_whatever_it_is_logged_for(regression, fit):
    class Logs(regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("each", float(batch_idx), on_step=True, on_epoch=False)
            self.log("mean", torch.tensor(10.0 + batch_idx), on_step=False, on_epoch=True)
            return loss

    report = only_record()
    fit(Logs(adamw), report)
    each, mean = report.record.logged["each"], report.record.logged["mean"]
    assert each.values == [1.0, 3.0] * 3 and each.steps == STEPS
    assert mean.values == [11.5] * 3 and mean.steps == [2, 4, 6]


@pytest.mark.parametrize("fused", [False, True])
def test_layers_are_measured_as_they_are(regression, fit, reference, fused):
    report = only_record()
    fit(regression(plain_sgd), *[Fuse(verbose=False)] * fused, report)
    layers = report.record.layers
    assert layers.keys() == {"grad_norm", "update_ratio", "activation", "closed"}
    grads = [curve.values for curve in layers["grad_norm"].values()]
    assert [*layers["grad_norm"]] == [*layers["activation"]] == ["net.0", "net.2"]
    assert [math.hypot(*pair) for pair in zip(*grads, strict=True)] == pytest.approx(
        report.record.grad_norm[ONLY].values, rel=1e-4
    )
    weights = [p.norm().item() for p in regression(plain_sgd).net[0].parameters()]
    first = 0.1 * layers["grad_norm"]["net.0"].values[0] / math.hypot(*weights)
    assert layers["update_ratio"]["net.0"].values[0] == pytest.approx(first, rel=0.1)  # of the weights after the step
    assert layers["activation"]["net.0"].steps == STEPS


def test_layers_are_measured_more_rarely_as_the_run_goes_on(regression, fit):
    report = only_record(measure_every=4)
    fit(regression(plain_sgd), report, epochs=130)
    steps = report.record.layers["grad_norm"]["net.0"].steps
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert steps[:6] == [1, 2, 3, 4, 8, 12] and gaps == sorted(gaps) and gaps[-1] == 6


def test_layers_are_left_alone_on_request(regression, fit):
    report = only_record(layers=False)
    fit(regression(adamw), report)
    assert report.record.layers == {} and report.record.loss.steps == STEPS


def test_the_findings_of_gradient_health_are_part_of_it(regression, fit):
    report = only_record()
    fit(regression(adamw), report)
    assert report.record.verdicts is None
    module = regression(lambda module: torch.optim.SGD(module.net[0].parameters(), lr=0.1))
    fit(module, report, health := GradientHealth(verbose=False))
    assert [each.symptom for each in report.record.verdicts] == ["not_optimized"] and health.verdicts


def test_the_record_lies_beside_the_page(regression, fit, tmp_path):
    fit(regression(adamw), report := Report(tmp_path / "run.html"))
    assert RunRecord.load(tmp_path / "run.json") == report.record
    assert report.record.environment["torch"].startswith(torch.__version__)


def test_seconds_go_on_when_a_run_is_resumed(regression, fit, tmp_path):
    first, second = only_record(), only_record()
    trainer = fit(regression(adamw), first, epochs=1)
    first.record.elapsed_s.values[-1] += 100.0
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(regression(adamw), second, ckpt_path=tmp_path / "half.ckpt")
    assert second.record.elapsed_s.values[2] > 100.0 and second.record.elapsed_s.steps == STEPS
    assert second.record.settings["date"] == first.record.settings["date"]


@pytest.mark.parametrize("verbose", [True, False])
def test_a_summary_is_printed_when_the_fit_ends(regression, fit, printed, verbose):
    fit(regression(adamw), only_record(name="mine", verbose=verbose))
    assert ("mine: 6 steps in" in printed()) == verbose


def test_the_plan_names_each_optimizer_and_the_norms(make_trainer, data):
    class Two(pl.LightningModule):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.Linear(4, 2)

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.b(self.a(batch[0])).square().mean())
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.a.parameters(), lr=0.1), torch.optim.Rprop(self.b.parameters())

    report = only_record()
    make_trainer(report, Fuse(verbose=False), epochs=1, accumulate_grad_batches=1).fit(Two(), data())
    assert "a: lightning_optkit.SGD\n" in report.record.explanation
    assert "b: torch.optim.rprop.Rprop: its own step" in report.record.explanation
    assert "1 LayerNorm -> layers.LayerNorm" in report.record.explanation
