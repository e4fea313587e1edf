# SPDX-License-Identifier: Apache-2.0
"""LRFinder where a test cannot be run or suggests nothing: it is refused, or there is a reason."""

import pytest
from lr_finder_cases import Net, Once, finder, fit
from torch import nn
from torch.utils.data import DataLoader

from lightning_optkit.callbacks import LRFinder


def test_without_a_fall_the_rate_stays(printed):
    found = LRFinder(1e-9, 1e-8, num_steps=60)
    trainer = fit(Net(), found)
    assert "LRFinder: no suggestion, the rate stays 0.05: the loss does not fall" in printed()
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05


def test_a_module_that_sets_the_rate_of_each_step_gets_no_suggestion(printed):
    class WarmsUp(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            optimizer.param_groups[0]["lr"] = 0.05 * min(1.0, (self.trainer.global_step + 1) / 10)
            optimizer.step(closure=closure)

    found = finder(verbose=True)
    trainer = fit(WarmsUp(), found)
    assert "no suggestion, the rate stays 0.05: WarmsUp sets the rate in each step itself." in printed()
    assert set(found.result.suggestions.values()) == {None} and trainer.optimizers[0].param_groups[0]["lr"] == 0.05


def test_data_that_can_be_read_once_end_the_test():
    with pytest.warns(UserWarning, match=r"^LRFinder\(num_steps=60\): the test ended after 8 steps .* used up"):
        fit(Net(), found := finder(), loader=DataLoader(Once(), batch_size=32))
    assert "only" in found.result.reason or found.result.lrs


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize(
    ("module", "arguments", "reason"),
    [
        (
            Net,
            dict(limit_train_batches=0),
            "no batch of the test had a loss (is there a batch, and does training_step return one?)",
        ),
        (
            type("Silent", (Net,), {"training_step": lambda *_: None}),
            {},
            "no batch of the test had a loss (is there a batch, and does training_step return one?)",
        ),
        (Net, dict(fast_dev_run=True), "not tested, since the run is a trial (fast_dev_run, or no steps at all)"),
    ],
    ids=["no batches", "no loss", "fast_dev_run"],
)
def test_without_a_test_there_is_a_reason(module, arguments, reason):
    fit(module(), found := finder(), **arguments)
    assert found.result.reason == reason and set(found.result.suggestions.values()) == {None}
    assert found.result.plot() is not None


def test_lazy_layers_are_refused():
    module = Net()
    module.net[0] = nn.LazyLinear(16)
    with pytest.raises(ValueError, match=r"^LRFinder\(\): a layer still waits for its first input"):
        fit(module, finder())


def test_manual_optimization_is_refused():
    class Manual(Net):
        automatic_optimization = False

    with pytest.raises(ValueError, match=r"^LRFinder\(\): needs automatic optimization"):
        fit(Manual(), finder())
    with pytest.raises(ValueError, match=r"given twice"):
        fit(Net(), finder(), finder())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(min_lr=0.0), r"LRFinder\(min_lr=0\.0\): min_lr must be in \(0, inf\)"),
        (dict(max_lr=1e-8), r"LRFinder\(max_lr=1e-08\): max_lr must be above min_lr"),
        (dict(num_steps=5), r"LRFinder\(num_steps=5\): num_steps must be an integer >= 20"),
        (
            dict(suggestion="trained", trial_steps=39),
            r"LRFinder\(trial_steps=39\): trial_steps must be an integer >= 40",
        ),
        (dict(trial_steps=100), r"LRFinder\(trial_steps=100\): trial_steps is for suggestion='trained' only\."),
        (dict(suggestion="best"), r"LRFinder\(suggestion='best'\): suggestion must be one of"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LRFinder(**arguments)


def test_a_loss_that_is_never_finite_is_not_the_fault_of_the_rate():
    class Broken(Net):
        def training_step(self, *args):
            return super().training_step(*args) * float("nan")

    found = LRFinder(num_steps=20, verbose=False)
    fit(Broken(), found, max_epochs=1)
    assert found.result.reason.startswith("the loss is infinite or NaN at the smallest rate already")
