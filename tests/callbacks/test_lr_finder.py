# SPDX-License-Identifier: Apache-2.0
"""A range test before the first step: the run after it is the one that the rate gives without it."""

import copy
import threading
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lr_finder_cases import QUIET, STRATEGIES, Net, data, finder, fit, same, with_own_generator
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from lightning_optkit.callbacks import LRFinder, LRSchedule
from lightning_optkit.diagnostics.lr_range import RULES, LRRange
from lightning_optkit.schedules import cosine


@pytest.mark.parametrize("rule", ["middle", "steepest", "valley", "minimum", "trained"])
def test_the_run_is_that_of_the_rate_without_a_finder(rule):
    found, plain = finder(suggestion=rule), Net()
    trainer = fit(module := Net(), found)
    rate = found.result.suggestions[rule]
    assert rate != 0.05 and trainer.optimizers[0].param_groups[0]["lr"] == rate
    plain.lr = rate
    fit(plain)
    assert same(module, plain) and trainer.global_step == 16 and trainer.current_epoch == 2


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


def test_a_plateau_rule_of_the_module_starts_at_the_rate():
    def configure(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "loss"}}

    fit(module := Net(configure=configure), found := finder())
    assert {rates[0] for rates in module.rates[-16:]} == {found.result.suggestions["middle"]}


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


def test_rates_over_the_whole_range_of_numbers():
    rates = LRFinder(min_lr=1e-300, max_lr=1e300, num_steps=21)._rates()
    assert rates[0] == 1e-300 and rates[-1] == 1e300 and rates[10] == pytest.approx(1.0)
