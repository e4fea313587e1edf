# SPDX-License-Identifier: Apache-2.0
"""SAM in real Trainers against an explicit loop, in three precisions."""

import contextlib

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torchmetrics import MeanMetric
from two_gradient_cases import Untouched

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import SAM, Fuse, LabelSmoothing, WeightAveraging
from lightning_optkit.regularization import asam, sam

BATCHES = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 3, (8, 4), generator=torch.Generator().manual_seed(1))


class Classifier(pl.LightningModule):
    """With everything that a second forward pass could disturb: BatchNorm, dropout, a metric and logs."""

    def __init__(self, configure=None, fail_at=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
        self.metric = MeanMetric()
        self.configure = configure or (lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
        self.fail_at, self.seen = fail_at, Untouched()

    def configure_optimizers(self):
        return self.configure(self)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.metric(loss.detach())
        self.log("train_loss", loss, on_epoch=True)
        self.log_dict({"twice": 2 * loss.detach()}, on_epoch=True)
        self.seen.append(self.net[0].weight.detach().clone())
        if self.fail_at == len(self.seen):
            raise KeyError("stop")
        return dict(loss=loss, extra=batch_idx)


class SeedEachBatch(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(100 * trainer.current_epoch + batch_idx)


def batches():
    return [(x, y) for x, y in zip(BATCHES, LABELS, strict=True)]


def trained(make_trainer, module, *callbacks, accumulate=2, **arguments):
    trainer = make_trainer(*callbacks, SeedEachBatch(), epochs=2, accumulate_grad_batches=accumulate, **arguments)
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
    return trainer


def written_out(ascent, accumulate, autocast=contextlib.nullcontext, smoothing=0.0):
    """Two epochs of SAM with SGD; BatchNorm's statistics and losses are those of the original weights."""
    module = Classifier()
    net, params, losses = module.net, list(module.net.parameters()), []
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    for epoch in range(2):
        for index, (x, y) in enumerate(batches()):

            def loss(x=x, y=y, seed=100 * epoch + index):
                torch.manual_seed(seed)
                with autocast():
                    return nn.functional.cross_entropy(net(x), y, label_smoothing=smoothing) / accumulate

            if index % accumulate == 0:
                optimizer.zero_grad()
            first = loss()
            losses.append(first.item() * accumulate)
            steps = ascent(params, torch.autograd.grad(first, params))
            true, statistics = [p.detach().clone() for p in params], [b.clone() for b in net.buffers()]
            for p, step in zip(params, steps, strict=True):
                p.data += step
            loss().backward()
            for p, t in zip(params, true, strict=True):
                p.data = t
            for b, s in zip(net.buffers(), statistics, strict=True):
                b.data = s
            if index % accumulate == accumulate - 1:
                optimizer.step()
    return net.state_dict(), losses


ASCENTS = {
    "sam": (SAM(rho=0.2), lambda params, grads: sam(grads, 0.2)),
    "asam": (SAM(adaptive=True), lambda params, grads: asam(params, grads, 0.5, 0.01)),
}
both = pytest.mark.parametrize("kind", ASCENTS)


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(dict(actual), dict(expected), rtol=0, atol=tolerance)


@both
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_equals_the_loop_that_is_written_out(make_trainer, kind, accumulate):
    callback, ascent = ASCENTS[kind]
    module = Classifier()
    trainer = trained(make_trainer, module, callback, accumulate=accumulate)
    expected, losses = written_out(ascent, accumulate)
    assert_close(module.net.state_dict(), expected, 1e-6)
    assert trainer.callback_metrics["train_loss_epoch"] == pytest.approx(sum(losses[8:]) / 8, abs=1e-6)
    assert trainer.callback_metrics["twice_epoch"] == pytest.approx(2 * sum(losses[8:]) / 8, abs=1e-6)
    assert module.metric.compute() == pytest.approx(sum(losses) / 16, abs=1e-6)


@both
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_in_mixed_precision_too(make_trainer, kind, precision):
    callback, ascent = ASCENTS[kind]
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    module = Classifier()
    trained(make_trainer, module, callback, precision=precision)
    expected, _ = written_out(ascent, 2, lambda: torch.autocast("cpu", dtype))
    # Gradients are rounded to the dtype, those of fp16 after loss scaling: they differ in the last places.
    assert_close(module.net.state_dict(), expected, 0 if precision == "bf16-mixed" else 2e-3)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_the_weights_are_climbed_only_from_the_first_run_to_the_end_of_the_backward_pass(make_trainer, precision):
    module, between = Classifier(), []

    class Between(Callback):
        def on_after_backward(self, trainer, pl_module):
            between.append(pl_module.net[0].weight.detach().clone())

    trained(make_trainer, module, Between(), SAM(), precision=precision)
    for first, second, after in zip(module.seen[::2], module.seen[1::2], between, strict=True):
        assert torch.equal(first, after) and not torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:Encountered `nan` values")
def test_a_first_gradient_that_overflows_makes_the_scaler_skip(make_trainer):
    class Huge(Classifier):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            return dict(output, loss=output["loss"] * 1e38)

    module = Huge()
    before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    trained(make_trainer, module, SAM(), precision="16-mixed")
    assert_close(module.net.named_parameters(), before, 0)


@pytest.mark.parametrize("order", [1, -1])
def test_with_a_clip_an_average_and_fuse_it_is_as_without_fuse(make_trainer, order):
    results = []
    for fuse in ([], [Fuse()]):
        module = Classifier()  # not Adam: the gradient of the bias before a BatchNorm is noise, which it would blow up
        callbacks = [*fuse, SAM(), WeightAveraging(EMA(0.5))]
        trained(make_trainer, module, *callbacks[::order], gradient_clip_val=0.5)
        results.append(module.net.state_dict())
    assert_close(*results, 1e-5)


@pytest.mark.parametrize("order", [1, -1])
def test_a_changed_loss_belongs_to_both_runs(make_trainer, order):
    module = Classifier()
    trained(make_trainer, module, *[SAM(rho=0.2), LabelSmoothing(0.2)][::order])
    assert_close(module.net.state_dict(), written_out(ASCENTS["sam"][1], 2, smoothing=0.2)[0], 1e-6)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_without_a_loss_is_passed_over(make_trainer):
    class Sometimes(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    module = Sometimes()
    trained(make_trainer, module, SAM(), accumulate=1)
    assert len(module.seen) == 2 * 8


@pytest.mark.parametrize("fail_at", [3, 4])
def test_an_exception_in_either_run_leaves_the_true_weights_and_the_module_as_it_was(make_trainer, fail_at):
    module = Classifier(fail_at=fail_at)
    with pytest.raises(KeyError):
        trained(make_trainer, module, SAM())
    assert torch.equal(module.net[0].weight, module.seen[0])
    assert module.net[1].num_batches_tracked == 1 if fail_at == 2 else 2
    assert not {"training_step", "backward", "log"} & set(vars(module))
    done = Classifier()
    trained(make_trainer, done, SAM())
    assert not {"training_step", "backward", "log"} & set(vars(done))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rho=0.0), r"^SAM\(rho=0\.0\): rho must be in \(0, inf\)\.$"),
        (dict(eta=-1.0), r"^SAM\(eta=-1\.0\): eta must be in \[0, inf\)\.$"),
        (dict(adaptive="yes"), r"^SAM\(adaptive='yes'\): adaptive must be one of False, True\.$"),
        (dict(sync=1), r"^SAM\(sync=1\): sync must be one of False, True\.$"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SAM(**arguments)


def test_what_cannot_work_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"^SAM\(\.\.\.\): given twice"):
        trained(make_trainer, Classifier(), SAM(), SAM())
    manual = Classifier()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match=r"^SAM\(\.\.\.\): Classifier optimizes manually; SAM must know"):
        trained(make_trainer, manual, SAM(), accumulate=1)
