# SPDX-License-Identifier: Apache-2.0
"""Real runs, broken one by one: rates, schedules, labels, losses and averages by which a run learns badly."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from gradient_health_cases import Classifier, loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import Fuse, GradientHealth, WeightAveraging
from lightning_optkit.optimizers import AdamW

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*GradientHealth.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


def test_a_clip_and_a_weight_decay_that_keep_a_run_from_learning(diagnose):
    module, large = Classifier(), DataLoader(loader().dataset, batch_size=32)
    module.body[2].p = 0.0
    (verdict,) = diagnose(module, data=large, epochs=30, gradient_clip_val=1e-3)
    assert verdict.symptom == "lr_too_low" and "gradients are cut to a norm of 0.001" in verdict.cause
    assert verdict.remedy.startswith("gradient_clip_val=0.03 in the Trainer")
    module = Classifier()
    module.optimizer = lambda params, lr: torch.optim.AdamW(params, lr=3e-3, weight_decay=150)
    (verdict,) = diagnose(module, epochs=6)
    assert verdict.symptom == "lr_too_high" and "weight decay takes away 45% of the weights" in verdict.cause


@pytest.mark.parametrize(("interval", "length"), [("step", 3), ("epoch", 48)])
def test_schedule_fault(diagnose, interval, length):
    module = Classifier()

    def configure():
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length)
        return [optimizer], [{"scheduler": scheduler, "interval": interval}]

    module.configure_optimizers = configure
    (verdict,) = diagnose(module)
    assert (verdict.symptom, verdict.layer) == ("schedule_fault", "CosineAnnealingLR")
    length = {3: 48, 48: 3}[length]
    assert diagnose(module) == []


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda schedulers, o: schedulers.ExponentialLR(o, 0.5),
        lambda schedulers, o: schedulers.StepLR(o, 1, 0.1),
        lambda schedulers, o: schedulers.MultiStepLR(o, [3, 6, 9, 12], 0.1),
    ],
)
def test_a_decay_that_was_meant_by_epochs(diagnose, scheduler):
    module = Classifier()

    def configure(interval):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        made = scheduler(torch.optim.lr_scheduler, optimizer)
        return [optimizer], [{"scheduler": made, "interval": interval}]

    module.configure_optimizers = lambda: configure("step")
    (verdict,) = diagnose(module, epochs=5)
    assert verdict.symptom == "schedule_fault" and verdict.remedy.startswith('{"scheduler": scheduler, "interval": "ep')
    module.configure_optimizers = lambda: configure("epoch")
    assert "schedule_fault" not in [each.symptom for each in diagnose(module, epochs=5)]


@pytest.mark.parametrize("name", ["cosine", "one cycle", "exponential"])
def test_a_schedule_that_ends_low_is_let_be(diagnose, name):
    module = Classifier()

    def configure():
        optimizer, schedulers = torch.optim.SGD(module.parameters(), lr=0.1), torch.optim.lr_scheduler
        made = {
            "cosine": lambda: schedulers.CosineAnnealingLR(optimizer, 80),
            "one cycle": lambda: schedulers.OneCycleLR(optimizer, 0.2, total_steps=80),
            "exponential": lambda: schedulers.ExponentialLR(optimizer, 1e-4 ** (1 / 80)),
        }[name]()
        return [optimizer], [{"scheduler": made, "interval": "step"}]

    module.configure_optimizers = configure
    assert diagnose(module, epochs=5) == []


class Weak(pl.LightningModule):
    """A regression whose inputs explain a twentieth of the targets, or of which so many targets are shuffled."""

    def __init__(self, scale=0.3, shuffled=0, rate=1e-3, columns=1):
        super().__init__()
        self.rate, generator = rate, torch.Generator().manual_seed(2)
        self.x = torch.randn(1800, 10, generator=generator)
        noise = torch.randn(1800, columns, generator=generator)
        self.y = scale * self.x[:, :columns] + noise
        self.y[:shuffled] = self.y[torch.randperm(shuffled, generator=generator)]
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, columns))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.rate)

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.x[:1200], self.y[:1200]), batch_size=32)

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.x[1200:], self.y[1200:]), batch_size=100)


@pytest.mark.parametrize("scale, columns, shuffled, symptoms", [
    (0.3, 1, 0, []), (0.3, 1, 1800, ["label_shuffle"]), (2.0, 6, 1200, ["label_shuffle"]), (2.0, 6, 0, []),
])  # fmt: skip
def test_labels_are_accused_only_where_those_of_the_validation_tell_that_there_is_something_to_learn(
    make_trainer, scale, columns, shuffled, symptoms
):
    rate = 3e-3 if shuffled else 1e-3
    module, health = Weak(scale, shuffled, rate, columns), GradientHealth(verbose=False)
    make_trainer(health, epochs=6, accumulate_grad_batches=1, limit_val_batches=1.0).fit(module)
    assert [each.symptom for each in health.verdicts] == symptoms
    assert "validation_step" not in vars(module)
    if symptoms:
        constant = float(module.y[1200:].var(0).mean())
        assert f"{constant:.4g}" in health.verdicts[0].evidence


@pytest.mark.parametrize("fused", [False, True])
def test_average_not_ready(diagnose, fused):
    module = Classifier()
    module.optimizer = AdamW if fused else torch.optim.AdamW
    (verdict,) = diagnose(module, WeightAveraging(EMA(0.999)))
    assert verdict.symptom == "average_not_ready" and "EMA(decay=0.8" in verdict.remedy
    assert diagnose(module, WeightAveraging(EMA(0.8))) == []


class TwoSoftmaxes(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.hidden(batch[0])).softmax(1), batch[1])


def test_loss_does_not_match_output(diagnose):
    (verdict,) = diagnose(TwoSoftmaxes())
    assert verdict.symptom == "loss_does_not_match_output" and "softmax" in verdict.remedy


@pytest.mark.parametrize(("rate", "symptom"), [(1e-6, "lr_too_low"), (300.0, "lr_too_high")])
@pytest.mark.parametrize("fused", [False, True])
def test_learning_rates(diagnose, rate, symptom, fused):
    module = Classifier()
    module.optimizer = lambda params, lr: torch.optim.SGD(params, lr=rate)
    data = DataLoader(loader().dataset, batch_size=16)
    verdicts = diagnose(module, *([Fuse(verbose=False)] if fused else []), data=data, epochs=24)
    assert verdicts[0].symptom == symptom


def test_data_and_initial_weights(diagnose):
    module, rows = Classifier(), loader().dataset.tensors
    wide = (rows[0] * torch.tensor([1.0] * 7 + [1e4]), rows[1])
    module.optimizer = lambda params, lr: torch.optim.SGD(params, lr=1e-4)
    data = DataLoader(TensorDataset(*wide), batch_size=16)
    assert diagnose(module, data=data, epochs=15)[0].symptom == "unnormalized_input"
    module = Classifier()
    nn.init.constant_(module.body[0].bias, -30.0)
    assert diagnose(module, data=DataLoader(TensorDataset(*rows), batch_size=32), epochs=25)[0].symptom == "dead_units"
    module = Classifier()
    same = DataLoader(TensorDataset(rows[0][:1].expand_as(rows[0]), rows[1]), batch_size=4)
    assert diagnose(module, data=same)[0].symptom == "input_ignored"
