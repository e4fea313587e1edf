# SPDX-License-Identifier: Apache-2.0
"""RDrop in real Trainers against an explicit loop."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric
from two_gradient_cases import Untouched

from lightning_optkit.callbacks import SAM, LabelSmoothing, RDrop

X = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (6, 4), generator=torch.Generator().manual_seed(1))
Y[:, 1] = -100
LR = 0.1


def cross_entropy(logits, y):
    return F.cross_entropy(logits, y)


class Classifier(pl.LightningModule):
    def __init__(self, loss=cross_entropy, dropout=0.5, fail_at=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 3))
        self.loss, self.fail_at, self.metric = loss, fail_at, MeanMetric()
        self.runs = Untouched()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR)

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(100 * self.current_epoch + batch_idx)

    def training_step(self, batch, batch_idx):
        loss = self.loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True)
        self.metric(loss.detach())
        self.runs.append(batch)
        if self.fail_at == len(self.runs):
            raise KeyError("stop")
        return loss


def trained(make_trainer, module, *callbacks, **arguments):
    data = torch.utils.data.DataLoader(list(zip(X, Y, strict=True)), batch_size=None)
    trainer = make_trainer(*callbacks, epochs=2, **{"accumulate_grad_batches": 2, **arguments})
    trainer.fit(module, data)
    return trainer


def written_out(alpha, smoothing=0.0):
    net, losses = Classifier().net, []
    for epoch in range(2):
        for index, (x, y) in enumerate(zip(X, Y, strict=True)):
            torch.manual_seed(100 * epoch + index)
            if index % 2 == 0:
                net.zero_grad()
            first = net(x)
            statistics = [b.clone() for b in net.buffers()]
            second = net(x)
            pair = [F.cross_entropy(z, y, label_smoothing=smoothing) for z in (first, second)]
            losses.append(pair[0].item())
            p, q = (z[y != -100].log_softmax(1) for z in (first, second))
            kl = sum(F.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in ((p, q), (q, p))) / 2
            ((sum(pair) / 2 + alpha * kl) / 2).backward()
            for b, s in zip(net.buffers(), statistics, strict=True):
                b.data = s
            if index % 2 == 1:
                for p in net.parameters():
                    p.data -= LR * p.grad
    return net.state_dict(), losses


def assert_close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(dict(actual), dict(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_it_equals_the_loop_that_is_written_out(make_trainer, alpha):
    module = Classifier()
    trainer = trained(make_trainer, module, RDrop(alpha))
    expected, losses = written_out(alpha)
    assert_close(module.net.state_dict(), expected)
    assert trainer.callback_metrics["train_loss_epoch"] == pytest.approx(sum(losses[6:]) / 6, abs=1e-6)
    assert module.metric.compute() == pytest.approx(sum(losses) / 12, abs=1e-6)
    assert len(module.runs) == 24


@pytest.mark.parametrize("order", [1, -1])
def test_with_label_smoothing_in_either_order(make_trainer, order):
    module = Classifier()
    trained(make_trainer, module, *[RDrop(0.5), LabelSmoothing(0.1)][::order])
    assert_close(module.net.state_dict(), written_out(0.5, smoothing=0.1)[0])


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_is_close(make_trainer, precision):
    module = Classifier()
    trained(make_trainer, module, RDrop(0.5), precision=precision)
    assert_close(module.net.state_dict(), written_out(0.5)[0], 2e-2 if precision == "bf16-mixed" else 2e-3)


@pytest.mark.parametrize("order", [1, -1])
def test_under_sam_each_of_its_runs_is_a_pair(make_trainer, order):
    module = Classifier()
    trained(make_trainer, module, *[RDrop(0.5), SAM()][::order])
    assert len(module.runs) == 48 and module.net[1].num_batches_tracked == 12


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.nll_loss(z.log_softmax(1), y),
        lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y.clamp(0), 3).float()),
        lambda z, y: F.binary_cross_entropy(z.sigmoid(), F.one_hot(y.clamp(0), 3).float(), reduction="sum"),
        lambda z, y: F.cross_entropy(z, z.detach().softmax(1)) + F.cross_entropy(z[0], y[0], reduction="sum"),
    ],
)
def test_every_classification_loss_is_regularized(make_trainer, loss):
    module, plain = Classifier(loss), Classifier(loss)
    trained(make_trainer, module, RDrop(2.0))
    trained(make_trainer, plain)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert not torch.allclose(module.net[3].weight, plain.net[3].weight)


def test_a_module_without_dropout_is_warned_about(make_trainer):
    with pytest.warns(UserWarning, match=r"^RDrop\(\): the two passes agree exactly; the module has no dropout"):
        trained(make_trainer, Classifier(dropout=0.0), RDrop())


def test_a_regression_loss_is_refused(make_trainer):
    module = Classifier(lambda z, y: F.mse_loss(z, z.detach() + 1))
    with pytest.raises(RuntimeError, match=r"^RDrop\(\): needs a classification loss; .* mse_loss"):
        trained(make_trainer, module, RDrop())


@pytest.mark.parametrize("fail_at", [3, 4, None])
def test_the_module_is_left_as_it_was(make_trainer, fail_at):
    module = Classifier(fail_at=fail_at)
    if fail_at:
        with pytest.raises(KeyError):
            trained(make_trainer, module, RDrop())
        assert module.net[1].num_batches_tracked == 2
    else:
        trained(make_trainer, module, RDrop())
    assert not {"training_step", "backward", "log"} & set(vars(module))


def test_bad_input_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"^RDrop\(alpha=0\.0\): alpha must be in \(0, inf\)\.$"):
        RDrop(0.0)
    with pytest.raises(ValueError, match=r"^RDrop\(\.\.\.\): given twice"):
        trained(make_trainer, Classifier(), RDrop(), RDrop())
    manual = Classifier()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match=r"^RDrop\(\.\.\.\): Classifier optimizes manually; RDrop must know"):
        trained(make_trainer, manual, RDrop(), accumulate_grad_batches=1)
