# SPDX-License-Identifier: Apache-2.0
"""Trials that cannot become good ones end early, with the reason; others are what they are without the callback."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import Fuse, GradientHealth, PruneTrial
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.diagnostics.rules.outcome import Outcome
from lightning_optkit.diagnostics.verdict import Verdict

optuna = pytest.importorskip("optuna", reason="it searches; pip install optuna")
pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 160


class Trial:
    def __init__(self):
        self.user_attrs = {}

    def set_user_attr(self, key, value):
        self.user_attrs[key] = value


class Classifier(pl.LightningModule):
    """Learns within the run at rate 0.1 and scale 1."""

    def __init__(self, rate=0.1, scale=1.0, poisoned=None):
        super().__init__()
        self.rate, self.poisoned = rate, poisoned
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
        with torch.no_grad():
            for param in self.net.parameters():
                param.mul_(scale)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        return loss * float("nan") if self.global_step == self.poisoned else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def data():
    inputs = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(dim=1)), batch_size=32)


def trainer_of(make_trainer, *callbacks):
    return make_trainer(*callbacks, epochs=STEPS // 8, accumulate_grad_batches=1)


def test_a_hopeless_trial_ends_before_its_half_and_says_why(make_trainer):
    trial = Trial()
    trainer = trainer_of(make_trainer, PruneTrial(trial))
    with pytest.raises(optuna.TrialPruned, match=r"^PruneTrial: after \d+ steps, bad_init_scale"):
        trainer.fit(Classifier(rate=1e-4, scale=8.0), data())
    assert 48 <= trainer.global_step < STEPS / 2
    assert trial.user_attrs["verdict"].startswith("bad_init_scale in net.0")
    assert not callbacks_of(trainer, GradientHealth)  # it was there for the fit only


@pytest.mark.parametrize("callbacks", [(), (Fuse,)], ids=["unfused", "fused"])
def test_a_trial_that_learns_is_what_it_is_without_the_callback(make_trainer, frozen, callbacks):
    weights = []
    for own in ([], [PruneTrial(Trial())]):
        module = Classifier()
        trainer = trainer_of(make_trainer, *[make(verbose=False) for make in callbacks], *own)
        trainer.fit(module, data())
        assert trainer.global_step == STEPS
        weights.append(frozen(list(module.parameters())))
    assert weights[0] == weights[1]


def test_a_trial_that_learns_despite_a_finding_is_let_be(make_trainer):
    health, trial = GradientHealth(verbose=False), Trial()
    trainer = trainer_of(make_trainer, health, PruneTrial(trial))
    trainer.fit(Classifier(rate=0.01, scale=4.0), data())
    assert [each.symptom for each in health.verdicts] == ["bad_init_scale"]
    assert trainer.global_step == STEPS and trial.user_attrs == {}


@pytest.mark.parametrize(
    "progress, ended_at",
    [
        ([-40.0, -20.0, -10.0, -2.5, -0.1, 0.05, 0.3, 0.8], None),
        ([-40.0, -39.0], 48),
        ([-40.0, -20.0, -19.0], 56),
        ([0.01, 0.02], 48),
        ([0.01, 0.06, 0.12, 0.02], 64),  # it had come, and is no longer there
        ([0.01, float("nan")], 48),
        ([-40.0, float("-inf")], 48),
    ],
)
def test_a_trial_that_is_coming_is_let_be_until_the_next_look(make_trainer, monkeypatch, progress, ended_at):
    said = Verdict("bad_init_scale", None, "cause", "seen", "remedy", 0, 0.7)
    left = iter(progress)

    def judge_now(health, below):
        outcome = Outcome(next(left, progress[-1]), False, True)
        return ([] if outcome.progress >= below else [said]), outcome

    monkeypatch.setattr(GradientHealth, "judge_now", judge_now)
    trainer = trainer_of(make_trainer, PruneTrial(Trial()))
    if ended_at is None:
        trainer.fit(Classifier(), data())
        assert trainer.global_step == STEPS
    else:
        with pytest.raises(optuna.TrialPruned):
            trainer.fit(Classifier(), data())
        assert trainer.global_step == ended_at


class WarmsUp(Classifier):
    """At a thousandth of its rate for the first 90 steps."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1e-3, 90)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("module, ended_at", [(WarmsUp, 96), (Classifier, 48)])
def test_no_trial_ends_before_its_rate_has_risen(make_trainer, monkeypatch, module, ended_at):
    said = Verdict("bad_init_scale", None, "cause", "seen", "remedy", 0, 0.7)
    monkeypatch.setattr("lightning_optkit.callbacks.gradient_health.diagnose", lambda run, guard: [said])
    trainer = trainer_of(make_trainer, PruneTrial(Trial()))
    with pytest.raises(optuna.TrialPruned):
        trainer.fit(module(rate=1e-4), data())
    assert trainer.global_step == ended_at


def test_a_run_of_unknown_length_is_judged_after_400_steps(make_trainer, monkeypatch):
    said = Verdict("bad_init_scale", None, "cause", "seen", "remedy", 0, 0.7)
    monkeypatch.setattr(GradientHealth, "judge_now", lambda health, below: ([said], Outcome(0.01, False, True)))
    trainer = make_trainer(PruneTrial(Trial()), epochs=-1, accumulate_grad_batches=1)
    with pytest.raises(optuna.TrialPruned):
        trainer.fit(Classifier(), data())
    assert trainer.global_step == 400


class HeavyTailed(Classifier):
    """The loss of one batch in eight is far above the others, from which it learns."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 100.0 * (batch_idx == 7)


def test_losses_of_few_batches_end_no_trial(make_trainer, monkeypatch):
    said = Verdict("loss_spike", None, "cause", "seen", "remedy", 0, 0.7)
    monkeypatch.setattr("lightning_optkit.callbacks.gradient_health.diagnose", lambda run, guard: [said])
    trainer = trainer_of(make_trainer, PruneTrial(Trial()))
    trainer.fit(HeavyTailed(rate=1.0), data())
    assert trainer.global_step == STEPS
    with pytest.raises(optuna.TrialPruned, match="loss_spike"):
        trainer_of(make_trainer, PruneTrial(Trial())).fit(Classifier(rate=1e-4), data())


def test_what_condemns_is_chosen(make_trainer):
    late, other, strict = (
        trainer_of(make_trainer, PruneTrial(Trial(), **rule))
        for rule in ({"after": 0.8}, {"symptoms": ["lr_too_high"]}, {"progress": 1.0})
    )
    with pytest.raises(optuna.TrialPruned):
        late.fit(Classifier(rate=1e-4, scale=8.0), data())
    assert late.global_step >= 0.8 * STEPS
    other.fit(Classifier(rate=1e-4, scale=8.0), data())
    assert other.global_step == STEPS
    with pytest.raises(optuna.TrialPruned):  # which learns, but not all
        strict.fit(Classifier(rate=0.01, scale=4.0), data())


@pytest.mark.parametrize("noise, is_ended", [(0.0, True), (0.9, False)])
def test_a_rate_that_is_too_low_ends_a_trial_only_where_another_could_do_better(
    make_trainer, monkeypatch, noise, is_ended
):
    said = Verdict("lr_too_low", None, "cause", "seen", "remedy", 0, 0.85)
    monkeypatch.setattr(GradientHealth, "judge_now", lambda health, below: ([said], Outcome(0.01, False, True)))
    (inputs, labels), generator = data().dataset.tensors, torch.Generator().manual_seed(2)
    chosen = torch.rand(len(labels), generator=generator) < noise
    labels = torch.where(chosen, torch.randint(0, 3, labels.shape, generator=generator), labels)
    module = Classifier(rate=1e-4)
    module.net = nn.Linear(8, 3)
    with torch.no_grad():
        module.net.weight.copy_(0.01 * torch.eye(3, 8).roll(1, 0))  # which class it is, but not by its own output
    trainer = trainer_of(make_trainer, PruneTrial(Trial()))
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=32)
    if is_ended:
        with pytest.raises(optuna.TrialPruned, match="lr_too_low"):
            trainer.fit(module, loader)
    else:
        trainer.fit(module, loader)
        assert trainer.global_step == STEPS


def test_a_loss_that_is_not_finite_ends_it_at_once(make_trainer):
    trial = Trial()
    trainer = trainer_of(make_trainer, PruneTrial(trial), GradientHealth(check_every=1, verbose=False))
    with pytest.raises(optuna.TrialPruned, match="nonfinite"):
        trainer.fit(Classifier(poisoned=20), data())
    assert 20 <= trainer.global_step <= 22 and trial.user_attrs["verdict"].startswith("nonfinite")


def test_a_fault_of_the_program_ends_no_trial(make_trainer):
    module = Classifier(rate=1e-6)
    module.configure_optimizers = lambda: torch.optim.SGD(module.net[0].parameters(), lr=1e-6)
    health = GradientHealth(verbose=False)
    trainer = trainer_of(make_trainer, PruneTrial(Trial()), health)
    trainer.fit(module, data())
    assert health.verdicts[0].symptom == "not_optimized" and trainer.global_step == STEPS


@pytest.mark.parametrize(
    "symptom", ["label_shuffle", "input_ignored", "class_imbalance", "unnormalized_input", "unscaled_target"]
)
def test_what_all_trials_share_ends_none(make_trainer, monkeypatch, symptom):
    said = Verdict(symptom, None, "cause", "seen", "remedy", 0, 0.7)
    monkeypatch.setattr(GradientHealth, "judge_now", lambda health, below: ([said], Outcome(0.01, False, True)))
    trainer = trainer_of(make_trainer, PruneTrial(Trial()))
    trainer.fit(Classifier(), data())
    assert trainer.global_step == STEPS
    with pytest.raises(optuna.TrialPruned, match=symptom):
        trainer_of(make_trainer, PruneTrial(Trial(), symptoms=[symptom])).fit(Classifier(), data())


def test_optuna_keeps_the_pruned_trial_and_goes_on(make_trainer):
    def objective(trial):
        rate = trial.suggest_categorical("rate", [1e-4, 0.1])
        module = Classifier(rate=rate, scale=8.0 if rate < 0.1 else 1.0)
        trainer_of(make_trainer, PruneTrial(trial)).fit(module, data())
        return 1.0

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.GridSampler({"rate": [1e-4, 0.1]}))
    study.optimize(objective, n_trials=2)
    by_rate = {trial.params["rate"]: trial for trial in study.trials}
    assert by_rate[1e-4].state == optuna.trial.TrialState.PRUNED and "verdict" in by_rate[1e-4].user_attrs
    assert by_rate[0.1].state == optuna.trial.TrialState.COMPLETE


def test_is_copied_with_a_trial_of_optuna():
    callback = PruneTrial(optuna.trial.FixedTrial({"lr": 0.1}), after=0.4)
    for made in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert made.after == 0.4 and made.trial.suggest_float("lr", 0, 1) == 0.1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"trial": None}, TypeError, r"^PruneTrial\(trial=None\): trial must be an optuna\.Trial\.$"),
        ({"after": 1.0}, ValueError, r"^PruneTrial\(after=1\.0\): after must be in \(0, 1\)\.$"),
        ({"progress": 0.0}, ValueError, r"^PruneTrial\(progress=0\.0\): progress must be in \(0, 1\]\.$"),
        ({"symptoms": "nonfinite"}, TypeError, r"^PruneTrial\(symptoms='nonfinite'\)"),
        ({"symptoms": ["slow"]}, ValueError, r"^PruneTrial\(symptoms='slow'\)"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        PruneTrial(**{"trial": Trial(), **arguments})


def test_without_optuna_the_package_and_the_extra_are_named(monkeypatch):
    monkeypatch.setattr("lightning_optkit.callbacks.prune_trial.find_spec", lambda name: None)
    for trial in (Trial(), None):
        with pytest.raises(
            ModuleNotFoundError, match=r"^PruneTrial needs optuna: pip install optuna, .*`search`"
        ) as got:
            PruneTrial(trial)
        assert got.value.name == "optuna"


def test_several_processes_are_refused(make_trainer, monkeypatch):
    monkeypatch.setattr(pl.Trainer, "world_size", property(lambda trainer: 2))
    with pytest.raises(ValueError, match=r"^PruneTrial\(\.\.\.\): a trial in 2 processes would end in one"):
        trainer_of(make_trainer, PruneTrial(Trial())).fit(Classifier(), data())


def test_a_trial_that_cannot_be_judged_is_said(make_trainer):
    module = Classifier(rate=1e-4)
    module.training_step = lambda batch, batch_idx: module.net(batch[0]).square().mean()  # no loss function of torch
    with pytest.warns(UserWarning, match=r"^PruneTrial\(\.\.\.\): the trial was not judged"):
        trainer_of(make_trainer, PruneTrial(Trial())).fit(module, data())
