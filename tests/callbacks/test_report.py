# SPDX-License-Identifier: Apache-2.0
"""The record contains what each optimizer step saw, is free where the step provides it, and has no side effects."""

import itertools
import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from report_cases import CLIP, STEPS, adamw, only_record, plain_sgd
from torch import nn
from torch.utils.data import DataLoader

from lightning_optkit.callbacks import ExactAccumulation, Fuse, Report, _gradient_norms, _pending_values
from lightning_optkit.callbacks import report as report_module
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import AdamW
from lightning_optkit.step import OnePassOptimizer

ONLY = "optimizer 0"  # the name of the optimizer of a whole module


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


def test_changes_no_bit_of_the_training(regression, fit, frozen):
    weights = []
    for callbacks in ([], [only_record()]):
        module = regression(adamw)
        fit(module, *callbacks, gradient_clip_val=CLIP)
        weights.append(frozen(list(module.parameters())))
    assert weights[0] == weights[1]


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
