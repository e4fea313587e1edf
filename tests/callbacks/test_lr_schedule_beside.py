# SPDX-License-Identifier: Apache-2.0
"""LRSchedule beside what else sets the rate: monitors, finders and the schedulers of the module."""

import contextlib
import csv

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lr_schedule_cases import LR, Adversaries, Broken, expected, groups_of, quiet, sgd
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LinearLR, OneCycleLR, ReduceLROnPlateau, SequentialLR

from lightning_optkit.callbacks import Fuse, LRFinder, LRSchedule
from lightning_optkit.optimizers import AdamW
from lightning_optkit.schedules import cosine, linear

pytestmark = [  # Lightning's warnings about these short runs
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You (defined|passed in) a .*Skipping val loop"),
    pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using"),
    pytest.mark.filterwarnings("ignore:The lr scheduler dict contains the key"),
]


def test_learning_rate_monitor_logs_the_rate_of_each_step(fit, regression, tmp_path):
    for order in (1, -1):
        logger = CSVLogger(tmp_path / str(order))
        callbacks = [quiet(linear()), LearningRateMonitor()][::order]
        arguments = dict(logger=logger, log_every_n_steps=1, accumulate_grad_batches=1)
        fit(regression(lambda m: torch.optim.SGD(groups_of(m))), *callbacks, **arguments)
        with open(logger.experiment.metrics_file_path) as file:
            logged = [float(row["lr-SGD/pg2"]) for row in csv.DictReader(file) if row["lr-SGD/pg2"]]
        assert list(dict.fromkeys(logged)) == expected(linear(), range(12), 12, base=0.3 * LR)


def test_the_finders_suggestion_is_the_base(fit, regression, recorder):
    class Findable(regression):
        lr = LR

    module = Findable(lambda m: torch.optim.SGD(m.parameters(), lr=m.lr))
    finder = LearningRateFinder(num_training_steps=20)
    fit(module, finder, quiet(linear()), recorder, epochs=6, accumulate_grad_batches=1)
    assert module.lr != LR
    assert recorder.values("lr") == expected(linear(), range(24), 24, base=module.lr)


def test_decay_apart_from_the_rate_follows_the_finders_suggestion(fit, regression):
    class Findable(regression):
        lr = LR

    module = Findable(lambda m: AdamW(m.parameters(), lr=m.lr, decouple_lr=True))
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    trainer = fit(module, finder, quiet(linear()), epochs=6, accumulate_grad_batches=1)
    assert module.lr != LR
    assert [group["decay_lr"] for group in trainer.optimizers[0].param_groups] == [module.lr]


def scheduled(make):
    def configure(module):
        optimizer = sgd(module)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "monitor": "train_loss"}}

    return configure


def chained(optimizer):
    return SequentialLR(optimizer, [LinearLR(optimizer), CosineAnnealingLR(optimizer, 3)], milestones=[2])


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda o: CosineAnnealingLR(o, 3), "CosineAnnealingLR"),
        (ReduceLROnPlateau, "ReduceLROnPlateau"),
        (chained, "SequentialLR, LinearLR, CosineAnnealingLR"),
    ],
    ids=["cosine", "plateau", "sequential"],
)
def test_beside_a_scheduler_of_the_module(fit, regression, recorder, printed, make, names):
    sentence = rf"^LRSchedule\(replace_schedulers=False\): configure_optimizers returns {names}, and both would set "
    with pytest.raises(ValueError, match=sentence):
        fit(regression(scheduled(make)), quiet(linear(), replace_schedulers=False))
    during = []

    class See(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            during.extend(trainer.lr_scheduler_configs)

    trainer = fit(regression(scheduled(make)), LRSchedule(linear()), recorder, See())
    assert during == [] and recorder.values("lr") == expected(linear())
    assert f"LRSchedule: in place of {names}, which configure_optimizers returns, until the fit ends." in printed()
    assert len(trainer.lr_scheduler_configs) == 1


def test_a_replaced_scheduler_is_given_back_after_an_error(fit, regression, make_trainer, data):
    trainer = make_trainer(quiet(linear()), Broken())
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(regression(scheduled(lambda o: CosineAnnealingLR(o, 3))), data())
    assert [type(config.scheduler) for config in trainer.lr_scheduler_configs] == [CosineAnnealingLR]


def test_a_scheduler_that_has_overwritten_the_rate_is_not_replaced(fit, regression):
    module = regression(scheduled(lambda o: CyclicLR(o, 0.1, 1.0, cycle_momentum=False)))
    with pytest.raises(ValueError, match=r"CyclicLR has overwritten the optimizer's own learning rate and momentum"):
        fit(module, quiet(linear()))


def one_cycle(optimizer):
    return OneCycleLR(optimizer, max_lr=[1.0, 0.5], total_steps=100)


def two_rates(module):
    optimizer = torch.optim.SGD(groups_of(module)[:2], lr=LR, momentum=0.8)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": one_cycle(optimizer), "interval": "step"}}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
def test_the_largest_rates_of_one_cycle_are_the_bases_until_the_fit_ends(fit, regression, recorder, printed, fused):
    callbacks = [Fuse(verbose=False)] if fused else []
    trainer = fit(regression(two_rates), *callbacks, LRSchedule(linear()), recorder)
    assert recorder.values("lr") == expected(linear(), base=1.0)
    assert recorder.values("lr", group=1) == expected(linear(), base=0.5)
    assert set(recorder.values("momentum")) == {0.95}  # as OneCycleLR has set it
    assert "in place of OneCycleLR, which configure_optimizers returns, until the fit ends; its largest" in printed()
    (optimizer,) = trainer.optimizers
    assert [group["initial_lr"] for group in optimizer.param_groups] == pytest.approx([1.0 / 25, 0.5 / 25])
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.last_epoch == 0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.0 / 25, rel=0.1)  # at the start of its cycle


@pytest.mark.parametrize("first", [[], [linear()]], ids=["by OneCycleLR", "by LRSchedule"])
def test_a_run_that_is_resumed_has_the_largest_rates_as_bases(fit, regression, recorder, tmp_path, first):
    save = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    callbacks = [quiet(schedule) for schedule in first]
    fit(regression(two_rates), *callbacks, save, epochs=1, enable_checkpointing=True)
    fit(regression(two_rates), quiet(linear()), recorder, epochs=2, ckpt_path=tmp_path / "last.ckpt")
    seen = recorder.values("lr")
    assert seen == expected(linear(), range(2 * len(seen))[len(seen) :], 2 * len(seen), base=1.0)


def test_a_finder_and_one_cycle(fit, regression, recorder, tmp_path):
    finder = LRFinder(num_steps=20, verbose=False)
    save = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    arguments = dict(accumulate_grad_batches=1, enable_checkpointing=True)
    trainer = fit(regression(two_rates), quiet(linear()), finder, save, recorder, epochs=6, **arguments)
    found = recorder.values("lr")[0]
    assert found != 1.0 and recorder.values("lr", group=1)[0] == pytest.approx(found / 2)
    (optimizer,) = trainer.optimizers
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(found / 25)


class SteppedByHand(Adversaries):
    """Steps its schedulers, as Lightning's page on manual optimization shows, and keeps one of them itself."""

    def configure_optimizers(self):
        optimizers = super().configure_optimizers()
        self.own = CosineAnnealingLR(optimizers[0], 3)
        return [*optimizers], [self.own, ReduceLROnPlateau(optimizers[1])]

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        cosine_of_first, plateau_of_second = self.lr_schedulers()
        assert isinstance(plateau_of_second, ReduceLROnPlateau)
        cosine_of_first.step()
        plateau_of_second.step(1.0)
        self.own.step()


@pytest.mark.parametrize("broken", [False, True], ids=["to the end", "with an error"])
def test_schedulers_that_are_stepped_by_hand_stand_still_until_the_fit_ends(
    make_trainer, data, recorder, printed, broken
):
    module = SteppedByHand()
    callbacks = [LRSchedule(linear()), recorder, *([Broken()] if broken else [])]
    trainer = make_trainer(*callbacks, accumulate_grad_batches=1)
    with pytest.raises(RuntimeError, match="broken") if broken else contextlib.nullcontext():
        trainer.fit(module, data())
    assert "in place of CosineAnnealingLR, ReduceLROnPlateau, which configure_optimizers returns, until" in printed()
    if not broken:
        assert recorder.values("lr") == expected(linear(), range(12), 12)
        assert recorder.values("lr", optimizer=1) == expected(linear(), range(1, 12, 2), 12, base=2 * LR)
    kept = [config.scheduler for config in trainer.lr_scheduler_configs]
    assert kept == module.lr_schedulers() and [type(each) for each in kept] == [CosineAnnealingLR, ReduceLROnPlateau]
    assert [each.last_epoch for each in kept] == [0, 0]
    module.own.step()
    assert module.own.last_epoch == 1 and "step" not in module.own.state_dict()


def test_two_of_a_kind_raise(fit, regression):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `LRSchedule`"):  # Lightning's own
        fit(regression(sgd), quiet(linear()), quiet(cosine()))


def test_beside_stochastic_weight_averaging(fit, regression):
    with pytest.raises(
        ValueError, match=r"^LRSchedule\(...\): StochasticWeightAveraging sets the learning rate itself"
    ):
        fit(regression(sgd), quiet(linear()), StochasticWeightAveraging(0.1))
