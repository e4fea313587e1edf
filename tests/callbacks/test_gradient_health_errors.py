# SPDX-License-Identifier: Apache-2.0
"""An error of GradientHealth itself does not end the fit nor change it; one of the user's module is the user's."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from gradient_health_cases import Classifier, loader

from lightning_optkit.callbacks import GradientHealth

pytestmark = pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*")

SEAMS, MEASURE = "lightning_optkit.callbacks.seams", "lightning_optkit.diagnostics.measure"
HEALTH = "lightning_optkit.callbacks.gradient_health"
PARTS = {  # what fails, and how the sentence begins
    f"{HEALTH}.SchedulesOfRun": "the look at schedules",
    f"{HEALTH}.averages_too_long": "the look at averages",
    f"{SEAMS}.modes_of_run.ModesOfRun.is_due": "a measured step",
    f"{SEAMS}.schedules_of_run.SchedulesOfRun.before_batch": "the look at schedules",
    f"{SEAMS}.schedules_of_run.SchedulesOfRun.after_batch": "the look at schedules",
    f"{SEAMS}.schedules_of_run.SchedulesOfRun.after_step": "the look at schedules",
    f"{SEAMS}.schedules_of_run.SchedulesOfRun.seen": "the look at schedules",
    f"{SEAMS}.associations_of_run.AssociationsOfRun.before_batch": "the look at fresh batches",
    f"{SEAMS}.associations_of_run.AssociationsOfRun.seen": "the look at fresh batches",
    f"{MEASURE}.associations.CalledAssociations._take": "the look at losses (CalledAssociations)",
    f"{SEAMS}.zeroing.Zeroing.before_backward": "the look at gradients that are left",
    f"{SEAMS}.zeroing.Zeroing.after_step": "the look at gradients that are left",
    f"{SEAMS}.presence.Presence.after_step": "the look at gradients that do not arrive",
    f"{SEAMS}.presence.Presence.silent": "the look at gradients that do not arrive",
    f"{SEAMS}.idle_batches.IdleBatches.before_backward": "the look at batches without a step",
    f"{SEAMS}.idle_batches.IdleBatches.after_batch": "the look at batches without a step",
    f"{SEAMS}.losses_of_run.LossesOfRun.after_batch": "the look at losses",
    f"{SEAMS}.losses_of_run.LossesOfRun.fetch": "the look at losses",
    f"{SEAMS}.measured_step.hidden_parameters": "a measured step",
    f"{SEAMS}.measured_step.CalledLayers": "a measured step",
    f"{SEAMS}.measured_step.MeasuredStep.after_step": "a measured step",
    f"{SEAMS}.measured_step.MeasuredStep.check": "a measured step",
    f"{SEAMS}.probe.Probe.__init__": "the probe",
    f"{SEAMS}.probe.Probe.measure": "the probe",
    f"{SEAMS}.probe._exchanged": "the probe",
    f"{MEASURE}.parameters.StepMeasure.begin": "the copy of weights before a step",
    f"{MEASURE}.calls.CalledFunctions._activation": "the look at activations and losses",
    f"{MEASURE}.calls.loss_seen": "the look at activations and losses",
    f"{MEASURE}.calls.CalledLayers.enter": "the look at layers",
    f"{MEASURE}.calls.CalledLayers.leave": "the look at layers",
    f"{MEASURE}.modules.CalledModules.called": "the look at modes",
    f"{SEAMS}.compared.digest": "the comparison of batches",
    f"{HEALTH}.ranked": "the conclusion",
    f"{SEAMS}.measured_steps.outcome_of": "a measured step",
}


class Slow(Classifier):
    """Learns so little that it is probed; has a scheduler, and batches without a step."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-5)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)]

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if epoch == 3 and batch_idx in (1, 2):
            optimizer_closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class Unlucky(Classifier):
    """Fails on its own, in the batch that is measured."""

    def hidden(self, x):
        return self.body(x) + F.relu(torch.zeros(3)) if self.global_step == 8 else self.body(x)


def fails(*args, **kwargs):
    raise LookupError("of ours")


def fitted(make_trainer, module, *callbacks):
    torch.manual_seed(0)
    make_trainer(*callbacks, epochs=4, accumulate_grad_batches=1).fit(module, loader())
    return module.state_dict()


@pytest.mark.parametrize("part", PARTS)
def test_no_part_ends_or_changes_a_fit(make_trainer, monkeypatch, frozen, errors_are_warnings, part):
    expected = fitted(make_trainer, Slow())
    monkeypatch.setattr(part, fails)
    module, health = Slow(), GradientHealth(check_every=4)
    with pytest.warns(UserWarning) as caught:
        assert frozen(fitted(make_trainer, module, health)) == frozen(expected)
    told = [str(each.message) for each in caught if "GradientHealth: " in str(each.message)]
    failures = [each for each in told if "failed and is left out, the rest goes on (LookupError: 'of ours'" in each]
    assert [each.split(" failed and")[0] for each in failures][:1] == [f"GradientHealth: {PARTS[part]}"]
    assert len(failures) == len(set(failures)) == len(health._guard.failed)
    assert not module.head._forward_hooks and not module.head._forward_pre_hooks and "training_step" not in vars(module)
    pickle.dumps(copy.deepcopy(health))


@pytest.mark.parametrize("group", ["EXACT", "OF_LEARNING"])
def test_the_other_rules_go_on(make_trainer, monkeypatch, errors_are_warnings, group):
    import lightning_optkit.diagnostics.rules as rules

    monkeypatch.setattr(rules, group, (fails, *getattr(rules, group)))
    module = Classifier()
    if group == "EXACT":
        module.eval()
    else:
        module.optimizer = lambda params, lr: torch.optim.AdamW(params, lr=3.0)
    health = GradientHealth(verbose=False)
    with pytest.warns(
        UserWarning, match="GradientHealth: the rule fails failed .* report .* or leave GradientHealth out"
    ):
        fitted(make_trainer, module, health)
    assert [each.symptom for each in health.verdicts] == ["wrong_mode" if group == "EXACT" else "lr_too_high"]
    with pytest.warns(UserWarning, match="the rule fails failed"):  # of another fit
        fitted(make_trainer, Classifier(), health)


def test_the_first_number_that_is_not_finite(make_trainer, monkeypatch, errors_are_warnings):
    monkeypatch.setattr(f"{HEALTH}.first_nonfinite", fails)
    with pytest.warns(UserWarning, match="the look for the first number that is not finite failed"):
        make_trainer(GradientHealth(), accumulate_grad_batches=1).fit(Classifier(), loader(poison=20))


def test_the_first_validation(make_trainer, monkeypatch, errors_are_warnings):
    class Validated(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))

    monkeypatch.setattr(f"{MEASURE}.targets.CalledTargets._take", fails)
    health = GradientHealth()
    with pytest.warns(UserWarning, match=r"the look at losses \(CalledTargets\) failed"):
        make_trainer(health, accumulate_grad_batches=1, limit_val_batches=1.0).fit(Validated(), loader(), loader())
    assert list(health._guard.failed) == ["the look at losses (CalledTargets)"]


def test_errors_of_the_module_are_the_users(make_trainer, errors_are_warnings):
    health = GradientHealth(check_every=4)
    with pytest.raises(RuntimeError, match="size of tensor"):
        fitted(make_trainer, Unlucky(), health)
    assert not health._guard.failed


def test_a_mistake_of_ours_fails_a_test(make_trainer, monkeypatch):
    monkeypatch.setattr(f"{SEAMS}.zeroing.Zeroing.after_step", fails)
    with pytest.raises(LookupError, match="of ours"):
        fitted(make_trainer, Classifier(), GradientHealth())
