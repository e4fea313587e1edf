# SPDX-License-Identifier: Apache-2.0
"""A range test before the first step: the run after it is the one that the rate gives without it."""

import copy
import random
import threading
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import (
    ExactResume,
    Fuse,
    GradientClipping,
    LRFinder,
    LRSchedule,
    ParameterGroups,
    PlateauSchedule,
    Preprocess,
    ScheduleFreeWrapper,
    WeightAveraging,
)
from lightning_optkit.clipping import AutoClip
from lightning_optkit.data import Standardize
from lightning_optkit.diagnostics.lr_range import RULES, LRRange
from lightning_optkit.optimizers import AdamW
from lightning_optkit.schedules import cosine, one_cycle

QUIET = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)


class Net(pl.LightningModule):
    """Draws from every generator in each step; `rates` has those of the steps."""

    def __init__(self, lr=0.05, configure=None, dtype=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))
        self.lr, self.configure, self.rates, self.own = lr, configure, [], np.random.default_rng(0)

    def training_step(self, batch, batch_idx):
        x, y = batch
        noise = random.random() + np.random.rand() + self.own.random()
        loss = nn.functional.mse_loss(self.net(x + 0.01 * noise), y)
        self.log("loss", loss)
        return loss

    def on_before_zero_grad(self, optimizer):
        self.rates.append([float(group["lr"]) for o in self.trainer.optimizers for group in o.param_groups])

    def configure_optimizers(self):
        if self.configure is not None:
            return self.configure(self)
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def data(**kwargs):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 4, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :2]), batch_size=32, **{"shuffle": True, **kwargs})


def fit(module, *callbacks, loader=None, ckpt_path=None, **kwargs):
    pl.seed_everything(3, verbose=False)
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "accelerator": "cpu", **kwargs}, callbacks=list(callbacks))
    trainer.fit(module, data() if loader is None else loader, ckpt_path=ckpt_path)
    return trainer


def finder(**kwargs):
    return LRFinder(**{"min_lr": 1e-5, "num_steps": 60, "verbose": False, **kwargs})


def same(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("rule", ["middle", "steepest", "valley", "minimum", "trained"])
def test_the_run_is_that_of_the_rate_without_a_finder(rule):
    found, plain = finder(suggestion=rule), Net()
    trainer = fit(module := Net(), found)
    rate = found.result.suggestions[rule]
    assert rate != 0.05 and trainer.optimizers[0].param_groups[0]["lr"] == rate
    plain.lr = rate
    fit(plain)
    assert same(module, plain) and trainer.global_step == 16 and trainer.current_epoch == 2


def with_own_generator():
    return data(generator=torch.Generator().manual_seed(5))


STRATEGIES = {
    "Fuse, EMA, AutoClip": lambda: [Fuse(verbose=False), GradientClipping(AutoClip(50)), WeightAveraging(EMA(0.9))],
    "its own passes": lambda: [GradientClipping(AutoClip(50)), WeightAveraging(EMA(0.9))],
    "ExactResume": lambda: [ExactResume()],
    "ScheduleFreeWrapper": lambda: [ScheduleFreeWrapper()],
    "Preprocess": lambda: [Preprocess(Standardize())],
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", STRATEGIES)
def test_beside_other_strategies(name, first):
    found = finder(max_lr=1.0)
    callbacks = STRATEGIES[name]()
    module, plain = Net(), Net()
    fit(module, *([found, *callbacks] if first else [*callbacks, found]))
    plain.lr = found.result.suggestions["middle"]
    fit(plain, *STRATEGIES[name]())
    assert same(module, plain)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(accumulate_grad_batches=3),
        dict(max_epochs=1, limit_train_batches=2),  # the test is longer than the run
        dict(max_epochs=-1, max_steps=5),
        dict(min_epochs=2),
        dict(loader=with_own_generator),
        dict(precision="bf16-mixed"),
    ],
    ids=["accumulation", "longer than the run", "max_steps", "min_epochs", "generator", "bf16"],
)
def test_in_other_runs(arguments):
    made = dict(arguments)
    make = made.pop("loader", data)
    found = finder()
    fit(module := Net(), found, loader=make(), **made)
    assert len(found.result.losses) > 20
    fit(plain := Net(found.result.suggestions["middle"]), loader=make(), **made)
    assert same(module, plain)


def test_groups_keep_their_ratio_and_schedulers_start_from_the_rate():
    def configure(module):
        groups = [dict(params=module.net[0].parameters(), lr=0.02), dict(params=module.net[4].parameters(), lr=0.1)]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, 16), "interval": "step"}]

    found = finder()
    fit(module := Net(configure=configure), found)
    low, high = module.rates[-16:][0]
    rate = found.result.suggestions["middle"]
    assert high == rate and low == pytest.approx(0.2 * rate)
    expected = [rate * (1 + np.cos(np.pi * step / 16)) / 2 for step in range(16)]
    assert [rates[1] for rates in module.rates[-16:]] == pytest.approx(expected)


# Each begins below its base or its largest rate, one of them at 0.
BEGIN_LOW = {
    "OneCycleLR": lambda o, lr: OneCycleLR(o, max_lr=lr, total_steps=17, pct_start=5 / 17),
    "warm-up": lambda o, lr: LambdaLR(o, lambda step: min(1.0, (step + 1) / 5)),
    "warm-up from 0": lambda o, lr: LambdaLR(o, lambda step: min(1.0, step / 5)),
    "warm-up, cosine": lambda o, lr: SequentialLR(
        o, [LinearLR(o, 0.1, total_iters=5), CosineAnnealingLR(o, 11)], milestones=[5]
    ),
    "CyclicLR": lambda o, lr: CyclicLR(o, base_lr=lr / 20, max_lr=lr, step_size_up=4),
}


def begins_low(name, lr=0.1):
    def configure(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
        return [optimizer], [{"scheduler": BEGIN_LOW[name](optimizer, lr), "interval": "step"}]

    return configure


@pytest.mark.parametrize("rule", ["middle", "trained"])
@pytest.mark.parametrize("name", BEGIN_LOW)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # of SequentialLR itself
def test_the_largest_rate_of_a_schedule_that_begins_low_is_the_one_found(name, rule):
    found = trained() if rule == "trained" else finder()
    fit(module := Net(configure=begins_low(name)), found)
    rate = found.result.suggestions[rule]
    fit(plain := Net(configure=begins_low(name, rate)))
    used = [rates[0] for rates in module.rates[-16:]]
    assert max(used) == pytest.approx(rate) and used[0] < rate / 4
    assert used == pytest.approx([rates[0] for rates in plain.rates])


def test_groups_under_a_schedule_that_begins_low_keep_the_ratio_of_their_largest_rates():
    def configure(module):
        groups = [dict(params=module.net[0].parameters()), dict(params=module.net[4].parameters())]
        optimizer = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
        scheduler = OneCycleLR(optimizer, max_lr=[0.02, 0.1], total_steps=17, pct_start=5 / 17)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    fit(module := Net(configure=configure), found := finder())
    largest = [max(rates) for rates in zip(*module.rates[-16:], strict=True)]
    rate = found.result.suggestions["middle"]
    assert largest == pytest.approx([0.2 * rate, rate])


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", ["OneCycleLR", "warm-up from 0"])
def test_lr_schedule_in_place_of_one_that_begins_low_has_the_rate_as_its_base(name, order, printed):
    found = finder()
    fit(module := Net(configure=begins_low(name)), *[found, LRSchedule(one_cycle(0.25))][::order])
    rate = found.result.suggestions["middle"]
    assert f"LRSchedule: lr {rate:g} times" in printed()
    assert max(rates[0] for rates in module.rates[-16:]) == pytest.approx(rate)


def test_a_plateau_rule_of_the_module_starts_at_the_rate():
    def configure(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "loss"}}

    fit(module := Net(configure=configure), found := finder())
    assert {rates[0] for rates in module.rates[-16:]} == {found.result.suggestions["middle"]}


@pytest.mark.parametrize("name", ["OneCycleLR", "warm-up from 0"])
def test_groups_of_a_callback_keep_their_ratio_under_a_schedule_that_begins_low(name):
    groups = ParameterGroups(layer_decay=0.5, verbose=False)
    fit(module := Net(configure=begins_low(name)), groups, found := finder())
    largest = sorted({max(rates) for rates in zip(*module.rates[-16:], strict=True)})
    rate = found.result.suggestions["middle"]
    assert largest[-1] == pytest.approx(rate) and largest[0] <= rate / 2 and len(largest) > 1


def test_plateau_schedule_in_place_of_one_that_begins_low_starts_at_the_rate():
    found = finder()
    plateau = PlateauSchedule("loss", patience=10, check_on_train_epoch_end=True, verbose=False)
    fit(module := Net(configure=begins_low("warm-up from 0")), plateau, found)
    assert {rates[0] for rates in module.rates[-16:]} == {found.result.suggestions["middle"]}


def test_fuse_decays_as_before_under_a_schedule_that_begins_at_0():
    def configure(module):
        optimizer = AdamW(module.parameters(), lr=0.1, weight_decay=0.01, decouple_lr=True)
        return [optimizer], [{"scheduler": BEGIN_LOW["warm-up from 0"](optimizer, 0.1), "interval": "step"}]

    trainer = fit(Net(configure=configure), found := finder())
    assert trainer.optimizers[0].param_groups[0]["decay_lr"] == found.result.suggestions["middle"]


@pytest.mark.parametrize("apply", [True, False])
def test_it_says_where_a_schedule_begins(printed, apply):
    found = LRFinder(1e-5, num_steps=60, apply=apply)
    fit(Net(configure=begins_low("OneCycleLR")), found)
    rate = found.result.suggestions["middle"]
    before, said = ", 0.1 before; the schedule of the module begins at ", printed()
    is_now, begins = (f"is now {rate:.3g} (middle)", rate / 25) if apply else ("stays 0.1", 0.1 / 25)
    assert f"the rate {is_now}{before}{begins:.3g}. Tested" in said


def test_a_resumed_run_keeps_the_rates_of_a_schedule_that_begins_low(tmp_path):
    module, again = (Net(configure=begins_low("CyclicLR")) for _ in "ab")
    trainer = fit(module, found := finder(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fit(again, finder(), ckpt_path=tmp_path / "a.ckpt", max_epochs=3)
    assert max(rates[0] for rates in again.rates) == pytest.approx(found.result.suggestions["middle"])


@pytest.mark.parametrize("order", [1, -1])
def test_lr_schedule_starts_from_the_rate(order):
    found = finder()
    fit(module := Net(), *[found, LRSchedule(cosine(), verbose=False)][::order])
    rate = found.result.suggestions["middle"]
    assert module.rates[-16:][0] == [rate] and module.rates[-16:][8] == [pytest.approx(rate / 2)]


def test_rates_that_are_tensors_are_changed_in_place():
    rate = torch.tensor(0.05)
    found = finder()
    fit(Net(configure=lambda m: torch.optim.AdamW(m.parameters(), lr=rate)), found)
    assert float(rate) == pytest.approx(found.result.suggestions["middle"])


def test_it_logs_saves_and_validates_nothing(tmp_path):
    class Log(pl.loggers.logger.DummyLogger):
        def __init__(self):
            super().__init__()
            self.steps = []

        def log_metrics(self, metrics, step=None):
            self.steps.append(step)

    class Validated(Net):
        validated = 0

        def validation_step(self, batch, batch_idx):
            self.validated += 1

    log, module = Log(), Validated()
    keep = ModelCheckpoint(tmp_path / "kept", save_last=True)
    arguments = dict(logger=log, log_every_n_steps=1, default_root_dir=tmp_path, enable_checkpointing=True)
    trainer = pl.Trainer(**{**QUIET, **arguments}, max_epochs=1, accelerator="cpu", callbacks=[finder(), keep])
    trainer.fit(module, data(), data(shuffle=False))
    assert log.steps == list(range(8)) and module.validated == 2 + 8
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"epoch=0-step=8.ckpt", "last.ckpt"}
    assert trainer.ckpt_path is None


def test_a_resumed_run_keeps_its_rates(tmp_path):
    trainer = fit(Net(), finder())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    found = finder()
    resumed = fit(Net(), found, ckpt_path=tmp_path / "a.ckpt", max_epochs=3)
    assert found.result.reason == "not tested, since a run resumed from a checkpoint keeps its rates"
    assert resumed.optimizers[0].param_groups[0]["lr"] == rate


@pytest.mark.parametrize("apply", [True, False])
def test_what_it_says(printed, apply):
    found = LRFinder(1e-5, num_steps=60, apply=apply)
    trainer = fit(Net(), found)
    rate = found.result.suggestions["middle"]
    said = next(line for line in printed().splitlines() if line.startswith("LRFinder: "))
    assert f"middle {rate:.3g}" in said and "0.05 before" in said
    assert (f"the rate is now {rate:.3g} (middle)" if apply else "the rate stays 0.05") in said
    assert trainer.optimizers[0].param_groups[0]["lr"] == (rate if apply else 0.05)


@pytest.mark.parametrize(
    ("rates", "suggestion", "warns"),
    [
        ((4e-5, 1e-3, 1e-3, 3e-3), "middle", True),
        ((4e-5, 1e-3, 1e-3, 3e-3), "steepest", False),
        ((4e-3, 1e-5, 1e-5, 3e-3), "steepest", True),
        ((4e-3, 1e-5, 1e-5, 3e-3), "middle", False),  # one of the others agrees
        ((4e-3, 1e-3, 1e-6, 3e-3), "valley", False),  # careful by design
    ],
)
@pytest.mark.parametrize("apply", [False, True])
def test_it_warns_where_the_rule_is_far_from_the_others(monkeypatch, rates, suggestion, warns, apply):
    found = LRRange((1e-7, 1.0), (1.0, 1.0), (1.0,), dict(zip(RULES, rates, strict=True)))
    monkeypatch.setattr(LRFinder, "_tested", lambda *_: found)
    found_by = LRFinder(suggestion=suggestion, apply=apply)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Net(), found_by, max_epochs=1)
    said = [str(each.message) for each in caught if "far apart" in str(each.message)]
    assert len(said) == warns and all('LRFinder(suggestion="trained") decides' in each for each in said)


def test_without_a_fall_the_rate_stays(printed):
    found = LRFinder(1e-9, 1e-8, num_steps=60)
    trainer = fit(Net(), found)
    assert "LRFinder: no suggestion, the rate stays 0.05: the loss does not fall" in printed()
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05


def trained(**kwargs):
    return finder(suggestion="trained", trial_steps=40, **kwargs)


@pytest.mark.parametrize("name", STRATEGIES)
def test_trained_beside_other_strategies(name):
    found = trained(max_lr=1.0)
    module, plain = Net(), Net()
    fit(module, *STRATEGIES[name](), found)
    plain.lr = found.result.suggestions["trained"]
    fit(plain, *STRATEGIES[name]())
    assert same(module, plain) and found.trials


@pytest.mark.parametrize("arguments", [dict(accumulate_grad_batches=3), dict(loader=with_own_generator)])
def test_trained_in_other_runs(arguments):
    made = dict(arguments)
    make = made.pop("loader", data)
    fit(module := Net(), found := trained(), loader=make(), **made)
    fit(plain := Net(found.result.suggestions["trained"]), loader=make(), **made)
    assert same(module, plain)


def test_each_training_is_that_of_a_run_at_its_rate():
    class Keeps(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.losses = [*getattr(self, "losses", []), float(loss.detach())]
            return loss

    fit(Net(), found := trained())
    assert {trial.steps for trial in found.trials} == {10, 20, 40}
    for trial in found.trials[::3]:
        fit(module := Keeps(trial.lr), max_epochs=-1, max_steps=trial.steps)
        assert trial.loss == pytest.approx(np.mean(module.losses[-(trial.steps // 4) :]))
    longest = [trial for trial in found.trials if trial.steps == 40]
    assert found.result.suggestions["trained"] == min(longest, key=lambda trial: trial.loss).lr


def test_trained_says_what_it_cost(printed):
    found = trained(verbose=True)
    fit(Net(), found)
    steps = sum(trial.steps for trial in found.trials)
    rates = [trial.lr for trial in found.trials]
    before, said = dict.fromkeys(line for line in printed().splitlines() if line.startswith("LRFinder"))
    does = "LRFinder tests 60 rates from 1e-05 to 10, a step each"
    assert before == f"{does}, then trains at some 10 rates for some 240 steps."
    assert f"the rate is now {found.result.suggestions['trained']:.3g} (trained)" in said
    assert f"rates from {min(rates):.3g} to {max(rates):.3g}, {steps} steps in all, in " in said


def test_trained_without_a_training_that_ends_keeps_the_rate(printed):
    steps = []

    class Late(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            steps.append(float(loss.detach()))  # not an attribute, which would return to what it was
            return loss * float("nan") if len(steps) > 60 else loss

    trainer = fit(Late(), found := trained(verbose=True), max_steps=1)
    assert "LRFinder: no suggestion, the rate stays 0.05: the loss diverged, or the data ended, in the" in printed()
    assert found.result.suggestions["trained"] is None and len(found.trials) <= 10
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05


def test_trained_on_data_that_can_be_read_once_has_a_reason():
    with pytest.warns(UserWarning, match=r"^LRFinder\(num_steps=60\): the test ended after 8 steps .* used up"):
        fit(Net(), found := trained(), loader=DataLoader(Once(), batch_size=32))
    assert found.result.reason and not any(trial.steps for trial in found.trials)


def test_without_a_range_nothing_is_trained():
    fit(Net(), found := trained(max_lr=1e-4))
    assert found.result.reason.startswith("the loss does not fall") and found.trials == ()


def test_a_step_that_fails_leaves_the_run_as_it_was():
    class Failing(Net):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 5:
                raise RuntimeError("no")
            return super().training_step(batch, batch_idx)

    module, found = Failing(), finder()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="no"):
        fit(module, found)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_schedulers_can_be_read_in_the_test_and_are_not_stepped():
    class Reading(Net):
        def training_step(self, batch, batch_idx):
            self.rates_of_scheduler = self.lr_schedulers().get_last_lr()
            return super().training_step(batch, batch_idx)

    def with_steps(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, 16), "interval": "step"}]

    found, module, plain = finder(), Reading(configure=with_steps), Reading(configure=with_steps)
    fit(module, found)
    plain.configure = lambda m: with_rate(with_steps(m), found.result.suggestions["middle"])
    fit(plain)
    assert same(module, plain) and module.rates == plain.rates


def with_rate(configured, rate):
    optimizers, (config,) = configured
    optimizers[0].param_groups[0].update(lr=rate, initial_lr=rate)
    return optimizers, [{**config, "scheduler": CosineAnnealingLR(optimizers[0], 16)}]


def test_a_module_that_sets_the_rate_of_each_step_gets_no_suggestion(printed):
    class WarmsUp(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            optimizer.param_groups[0]["lr"] = 0.05 * min(1.0, (self.trainer.global_step + 1) / 10)
            optimizer.step(closure=closure)

    found = finder(verbose=True)
    trainer = fit(WarmsUp(), found)
    assert "no suggestion, the rate stays 0.05: WarmsUp sets the rate in each step itself." in printed()
    assert set(found.result.suggestions.values()) == {None} and trainer.optimizers[0].param_groups[0]["lr"] == 0.05


class Once(torch.utils.data.IterableDataset):
    def __init__(self):
        x = torch.randn(256, 4)
        self.rows = iter(list(zip(x, x[:, :2], strict=True)))

    def __iter__(self):
        return self.rows


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


def test_what_a_module_does_at_a_later_epoch_of_the_test_is_undone():
    class Unfreezes(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:  # of the test alone: the run has two epochs
                self.net[0].requires_grad_(True)
                self.optimizers().add_param_group({"params": self.net[0].parameters()})
                self.net[1].eval()

        def on_fit_start(self):
            self.net[0].requires_grad_(False)

    found = finder()
    module, plain = (Unfreezes(configure=lambda m: torch.optim.SGD(m.net[1:].parameters(), lr=m.lr)) for _ in "ab")
    trainer = fit(module, found)
    plain.lr = found.result.suggestions["middle"]
    fit(plain)
    assert same(module, plain) and len(trainer.optimizers[0].param_groups) == 1
    assert module.net[1].training and not module.net[0].weight.requires_grad


def test_lazy_layers_are_refused():
    module = Net()
    module.net[0] = nn.LazyLinear(16)
    with pytest.raises(ValueError, match=r"^LRFinder\(\): a layer still waits for its first input"):
        fit(module, finder())


def test_what_a_module_saves_need_not_be_copyable():
    class Saves(Net):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["lock"] = threading.Lock()

    fit(Saves(), found := finder())
    assert found.result.suggestions["middle"] is not None


def test_a_bar_that_another_process_shows_stays_off():
    bar = TQDMProgressBar()
    bar.disable()
    fit(Net(), finder(), bar, enable_progress_bar=True)
    assert not bar.is_enabled


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


def test_rates_over_the_whole_range_of_numbers():
    rates = LRFinder(min_lr=1e-300, max_lr=1e300, num_steps=21)._rates()
    assert rates[0] == 1e-300 and rates[-1] == 1e300 and rates[10] == pytest.approx(1.0)


def test_a_loss_that_is_never_finite_is_not_the_fault_of_the_rate():
    class Broken(Net):
        def training_step(self, *args):
            return super().training_step(*args) * float("nan")

    found = LRFinder(num_steps=20, verbose=False)
    fit(Broken(), found, max_epochs=1)
    assert found.result.reason.startswith("the loss is infinite or NaN at the smallest rate already")
