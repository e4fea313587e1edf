# SPDX-License-Identifier: Apache-2.0
"""Healthy runs have no verdict and are not changed; verdicts are there in time, and leave nothing behind."""

import json
import random
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from gradient_health_cases import Classifier, loader
from torch import nn
from torch.utils.data import DataLoader

from lightning_optkit.callbacks import Fuse, GradientHealth, LRFinder, ReleaseGradients
from lightning_optkit.callbacks.seams.probe import Probe
from lightning_optkit.optimizers import SGD, AdamW
from tests.workers import launch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*GradientHealth.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, AdamW])
def test_a_healthy_run_has_none(diagnose, optimizer, precision, accumulated):
    torch.manual_seed(0)  # of the dropout
    module = Classifier()
    module.optimizer = optimizer
    assert diagnose(module, precision=precision, accumulate_grad_batches=accumulated) == []


@pytest.mark.parametrize(
    "beside",
    [lambda: Fuse(verbose=False), ReleaseGradients, lambda: LRFinder(num_steps=20, apply=False, verbose=False)],
)
def test_a_healthy_run_beside_others_has_none(diagnose, beside):
    torch.manual_seed(0)  # of the dropout
    module = Classifier()
    module.optimizer = SGD
    assert diagnose(module, beside()) == []


@pytest.mark.parametrize("rate", [0.05, 1e-5])
@pytest.mark.parametrize("fused", [False, True])
def test_the_run_is_the_same_bit_for_bit(make_trainer, monkeypatch, frozen, fused, rate):
    """Also with probes, which run `training_step` again, with dropout, batch norms and `spectral_norm`."""
    weights, probes = [], []
    original = Probe.measure
    monkeypatch.setattr(Probe, "measure", lambda self, *args: probes.append(original(self, *args)) or probes[-1])
    for watched in (False, True):
        module, beside = Classifier(), [Fuse(verbose=False)] if fused else []
        module.body.append(nn.BatchNorm1d(16))
        torch.manual_seed(0)
        nn.utils.parametrizations.spectral_norm(module.body[0])
        module.optimizer = lambda params, lr: torch.optim.SGD(params, lr=rate, momentum=0.9)
        beside += [GradientHealth(check_every=1)] if watched else []
        torch.manual_seed(0)
        make_trainer(*beside, epochs=6).fit(module, loader())
        weights.append(frozen(module.state_dict()))
        assert not module._forward_pre_hooks and not module.head._forward_hooks and "training_step" not in vars(module)
    assert weights[0] == weights[1]
    assert len(probes) >= 4 or rate > 1e-5
    assert all(probe.before == pytest.approx(probe.full, abs=1e-3) for probe in probes if rate == 1e-5)


class Adversaries(pl.LightningModule):
    """The backward pass of each goes through the other, whose gradients are cleared only before its own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        second.zero_grad()
        self.manual_backward(self.other(self.one(batch[0][:, :4]).detach()).square().mean())
        second.step()
        first.zero_grad()
        self.manual_backward(-self.other(self.one(batch[0][:, :4])).square().mean().tanh())
        first.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(each.parameters(), lr=0.01) for each in (self.one, self.other)]


def test_two_optimizers_in_turn_are_healthy(diagnose):
    assert diagnose(Adversaries()) == []


def test_what_the_first_step_shows_is_said_at_once_and_withdrawn_if_later_ones_do_not(make_trainer):
    class FirstInEval(Classifier):
        said = ()

        def training_step(self, batch, batch_idx):
            self.said = (*self.said, [verdict.symptom for verdict in self.trainer.callbacks[0].verdicts])
            self.train(self.global_step > 0)
            return super().training_step(batch, batch_idx)

    module, health = FirstInEval(), GradientHealth(check_every=1, verbose=False)
    make_trainer(health, accumulate_grad_batches=1).fit(module, loader())
    assert module.said[:3] == ([], ["wrong_mode"], []) and health.verdicts == []


def test_probes_leave_schedulers_alone_and_can_be_left_out(make_trainer, monkeypatch):
    class StepsIt(Classifier):
        def training_step(self, batch, batch_idx):
            self.lr_schedulers().step()
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-6)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
            return [optimizer], [{"scheduler": scheduler, "interval": "epoch", "frequency": 1000}]

    probes, original = [], Probe.measure
    monkeypatch.setattr(Probe, "measure", lambda self, *args: probes.append(original(self, *args)) or probes[-1])
    left_out_later = GradientHealth(verbose=False)
    left_out_later.probe = False
    for health in (GradientHealth(verbose=False), GradientHealth(verbose=False, probe=False), left_out_later):
        module, probe = StepsIt(), health.probe
        trainer = make_trainer(health, epochs=3, accumulate_grad_batches=1)
        trainer.fit(module, loader())
        assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 48
        assert bool(probes) == probe
        probes.clear()


@pytest.mark.parametrize(
    ("made", "drawn"),
    [
        (lambda: torch.Generator().manual_seed(3), lambda own: float(torch.rand((), generator=own))),
        (lambda: np.random.default_rng(3), lambda own: own.random()),
        (lambda: np.random.RandomState(3), lambda own: own.rand()),
        (lambda: random.Random(3), lambda own: own.random()),
    ],
    ids=["torch", "numpy", "numpy, old", "random"],
)
def test_probes_draw_nothing_from_a_generator_of_the_module(make_trainer, monkeypatch, frozen, made, drawn):
    class Noisy(Classifier):
        optimizer = staticmethod(lambda params, lr: torch.optim.SGD(params, lr=1e-6))

        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0] + drawn(self.body.own), batch[1]), batch_idx)

    weights, probes, original = [], [], Probe.measure
    monkeypatch.setattr(Probe, "measure", lambda self, *args: probes.append(original(self, *args)) or probes[-1])
    for callbacks in ([], [GradientHealth(verbose=False)]):
        torch.manual_seed(0)
        module = Noisy()
        module.body.own = made()
        make_trainer(*callbacks, epochs=3, accumulate_grad_batches=1).fit(module, loader())
        weights.append(frozen(module.state_dict()))
    assert weights[0] == weights[1] and probes


def test_batches_of_one_sample_are_healthy(diagnose):
    data = DataLoader(loader().dataset, batch_size=1, shuffle=True)
    assert diagnose(Classifier(), data=data) == []


@pytest.mark.parametrize("symptom", ["wrong_mode", "lr_too_high"])
def test_a_new_primary_verdict_is_a_warning_once(make_trainer, symptom):
    """Also if its numbers change from check to check."""
    for verbose in (True, False):
        module = Classifier()
        if symptom == "wrong_mode":
            module.eval()
        else:
            module.optimizer = lambda params, lr: torch.optim.AdamW(params, lr=3.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            health = GradientHealth(check_every=1, verbose=verbose)
            make_trainer(health, epochs=8, accumulate_grad_batches=1).fit(module, loader())
        assert [verdict.symptom for verdict in health.verdicts] == [symptom]
        told = [str(each.message) for each in caught if f"GradientHealth: {symptom}" in str(each.message)]
        assert len(told) == verbose


def test_verdicts_are_there_during_the_fit_in_json_and_in_checkpoints(make_trainer, tmp_path):
    class Asks(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append([verdict.symptom for verdict in health.verdicts])

    seen, health, module = [], GradientHealth(verbose=False), Classifier()
    module.eval()
    trainer = make_trainer(health, Asks(), epochs=2)
    trainer.fit(module, loader())
    assert seen == [["wrong_mode"]] * 2
    assert [each["symptom"] for each in json.loads(health.to_json())] == ["wrong_mode"]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = GradientHealth(verbose=False)
    make_trainer(resumed, epochs=3).fit(Classifier(), loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert resumed.verdicts == health.verdicts  # of the run, not of the process
    make_trainer(resumed, epochs=1).fit(Classifier(), loader())
    assert resumed.verdicts == []


def test_what_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"^GradientHealth\(check_every=0\)"):
        GradientHealth(check_every=0)
    with pytest.raises(ValueError, match=r"^GradientHealth\(verbose=None\)"):
        GradientHealth(verbose=None)
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `GradientHealth`"):
        make_trainer(GradientHealth(), GradientHealth())  # Lightning's own words
    with pytest.raises(ValueError, match="verdicts"):
        GradientHealth().load_state_dict({})


def test_an_exception_leaves_nothing_behind(make_trainer):
    module = Classifier()
    module.optimizer = AdamW

    def fails(x):
        raise RuntimeError("out of luck")

    module.hidden = fails
    with pytest.raises(RuntimeError, match="out of luck"):
        make_trainer(GradientHealth(check_every=1)).fit(module, loader())
    assert not module.head._forward_pre_hooks and not module.trainer.optimizers[0].record_statistics


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("healthy", []),
        ("diverges", ["ranks_diverge"]),
        ("duplicates", ["duplicate_data"]),
        ("bypassed", ["ranks_diverge"]),
        ("dominated", []),
    ],
)
def test_on_two_processes(tmp_path, case, expected):
    launch(Path(__file__).parent / "gradient_health_worker.py", tmp_path, case, processes=2, timeout=120)
    for rank in range(2):
        verdicts = json.loads((tmp_path / f"{case}.{rank}.json").read_text())
        assert [verdict["symptom"] for verdict in verdicts] == expected
        if case == "diverges":
            assert (verdicts[0]["layer"], verdicts[0]["onset_step"]) == ("net.2.weight", 4)
