# SPDX-License-Identifier: Apache-2.0
"""What Report records of a run besides its curves: the plan, the settings, the callbacks and their findings."""

import re

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping
from report_cases import CLIP, adamw, only_record
from torch import nn

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import Fuse, GradientHealth, NoiseScale, WeightAveraging


def test_the_plan_is_the_one_of_the_running_fit(regression, fit):
    report = only_record()
    fit(regression(adamw), report, WeightAveraging(EMA(0.9)), Fuse(verbose=False), gradient_clip_val=CLIP)
    for stage in ("ClipNorm(max_norm=0.05)", "update", "EMA(decay=0.9"):
        assert stage in report.record.explanation
    fit(regression(adamw), report)
    assert report.record.explanation == "torch.optim.adamw.AdamW: its own step; nothing is folded into it"


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


def test_the_findings_of_gradient_health_are_part_of_it(regression, fit):
    report = only_record()
    fit(regression(adamw), report)
    assert report.record.verdicts is None
    module = regression(lambda module: torch.optim.SGD(module.net[0].parameters(), lr=0.1))
    fit(module, report, health := GradientHealth(verbose=False))
    assert [each.symptom for each in report.record.verdicts] == ["not_optimized"] and health.verdicts


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
