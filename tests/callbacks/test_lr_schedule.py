# SPDX-License-Identifier: Apache-2.0
"""LRSchedule: the rate that each optimizer step saw, in every unit, resumed, extended, and beside what else sets it."""

import contextlib
import csv
import math
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.utils.data import DataLoader, IterableDataset

from lightning_optkit.callbacks import ExactResume, Fuse, LRFinder, LRSchedule
from lightning_optkit.callbacks.scheduling.clock import steps_in_run
from lightning_optkit.optimizers import AdamW
from lightning_optkit.schedules import (
    constant,
    cosine,
    exponential,
    inverse_time,
    join,
    linear,
    piecewise_constant,
    warmup,
    warmup_cosine,
)

pytestmark = [  # Lightning's warnings about these short runs
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You (defined|passed in) a .*Skipping val loop"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args"),
    pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using"),
    pytest.mark.filterwarnings("ignore:The lr scheduler dict contains the key"),
]
LR = 0.1
RUN = 6  # optimizer steps of three epochs of two windows of two batches of two


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=LR)


def groups_of(module, lr=LR):
    """Two groups at different rates."""
    first, _, last = module.net
    return [{"params": first.parameters(), "lr": lr}, {"params": last.parameters(), "lr": 0.3 * lr}]


def tensor_lr(module):
    return torch.optim.AdamW(module.parameters(), lr=torch.tensor(LR), foreach=False, capturable=False)


def quiet(schedule, *args, **kwargs):
    return LRSchedule(schedule, *args, verbose=False, **kwargs)


def expected(schedule, positions=range(RUN), total=RUN, base=LR):
    return pytest.approx([base * schedule(position, total) for position in positions], rel=1e-6)


# --- what each step saw ---


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
@pytest.mark.parametrize(
    "schedule",
    [warmup_cosine(2), linear(), exponential(0.5), inverse_time(1.0), piecewise_constant([2, 0.9], [1.0, 0.1, 0.01])],
    ids=lambda schedule: schedule.name,
)
def test_each_step_sees_its_rate(fit, regression, recorder, schedule, fused):
    callbacks = [Fuse(verbose=False)] if fused else []
    fit(regression(lambda m: torch.optim.AdamW(groups_of(m))), *callbacks, quiet(schedule), recorder)
    assert recorder.values("lr") == expected(schedule)
    assert recorder.values("lr", group=1) == expected(schedule, base=0.3 * LR)


@pytest.mark.parametrize(
    "configure", [sgd, tensor_lr, lambda m: AdamW(m.parameters(), lr=LR)], ids=["SGD", "tensor lr", "one-pass"]
)
def test_the_weights_are_those_of_torch_under_lambda_lr(fit, regression, configure):
    schedule = warmup_cosine(0.4)

    def with_torch(module):
        optimizer = configure(module)
        scheduler = LambdaLR(optimizer, lambda step: schedule(step, RUN))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    ours, theirs = regression(configure), regression(with_torch)
    fit(ours, quiet(schedule))
    fit(theirs)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-7)


def test_a_tensor_is_filled_and_not_replaced(fit, regression):
    rate = torch.tensor(LR)
    fit(regression(lambda m: torch.optim.AdamW(m.parameters(), lr=rate, foreach=False)), quiet(linear(1.0, 0.5)))
    assert rate.item() == pytest.approx(0.5 * LR)


@pytest.mark.parametrize(
    ("interval", "positions", "total"),
    [
        ("step", [0, 1, 2, 3, 4, 5], 6),
        ("epoch", [0, 0, 1, 1, 2, 2], 3),
        ("fractional_epoch", [0, 0.5, 1, 1.5, 2, 2.5], 3),
        ("sample", [0, 4, 8, 12, 16, 20], 24),
    ],
)
def test_counts_in_the_unit_it_is_told(fit, regression, recorder, interval, positions, total):
    for schedule in (linear(), warmup(linear(), 1, start_factor=0.5)):
        recorder.steps.clear()
        fit(regression(sgd), quiet(schedule, interval), recorder)
        assert recorder.values("lr") == expected(schedule, positions, total)


def num_tokens(batch):
    return 10 * len(batch[0])


def test_counts_tokens_as_it_is_told_to(fit, regression, recorder):
    fit(regression(sgd), quiet(linear(), "token", total=300, count=num_tokens), recorder)
    assert recorder.values("lr") == expected(linear(), [0, 40, 80, 120, 160, 200], 300)


def test_the_count_of_samples_is_independent_of_the_batch(fit, regression, recorder):
    fit(regression(sgd), quiet(linear(), "sample"), recorder, accumulate_grad_batches=3)  # windows of 3 and 1
    assert recorder.values("lr") == expected(linear(), [0, 6, 8, 14, 16, 22], 24)


def test_a_group_that_is_added_later_has_its_own_base(fit, regression, recorder):
    class Unfreeze(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.optimizers[0].add_param_group({"params": pl_module.net[0].parameters(), "lr": 0.7})

    def head_only(module):
        return torch.optim.SGD(module.net[2].parameters(), lr=LR)

    fit(regression(head_only), quiet(linear()), Unfreeze(), recorder, accumulate_grad_batches=1)
    assert recorder.values("lr") == expected(linear(), range(12), 12)
    later = [step[1]["lr"] for step in recorder.steps[0][4:]]
    assert later == expected(linear(), range(4, 12), 12, base=0.7)


def test_a_step_that_the_scaler_skips_counts(fit, regression, recorder):
    module = regression(sgd, poisoned=[(0, 0)])
    trainer = fit(module, quiet(linear()), recorder, precision="16-mixed")
    assert trainer.global_step == RUN
    assert recorder.values("lr") == expected(linear(), range(1, RUN))  # the first was not taken


class Adversaries(pl.LightningModule):
    """Two optimizers, stepped by hand, the second every other batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net, self.other = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=LR), torch.optim.Adam(self.other.parameters(), lr=2 * LR)

    def training_step(self, batch, batch_idx):
        for optimizer, net in zip(self.optimizers(), (self.net, self.other), strict=True):
            if net is self.net or batch_idx % 2:
                optimizer.zero_grad()
                self.manual_backward(net(batch[0]).pow(2).mean())
                optimizer.step()


def test_one_callback_serves_several_optimizers(fit, recorder):
    fit(Adversaries(), quiet(linear()), recorder, accumulate_grad_batches=1)
    assert recorder.values("lr") == expected(linear(), range(12), 12)
    assert recorder.values("lr", optimizer=1) == expected(linear(), range(1, 12, 2), 12, base=2 * LR)


def test_max_steps_of_several_optimizers(fit, recorder):
    module = Adversaries()
    trainer = fit(module, quiet(linear()), recorder, accumulate_grad_batches=1, max_steps=9)
    assert steps_in_run(trainer, module) == 5


# --- the length of the run ---


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"epochs": 5},
        {"max_steps": 5},
        {"max_steps": 50},
        {"epochs": -1, "max_steps": 4},
        {"accumulate_grad_batches": 3},
        {"limit_train_batches": 3},
    ],
    ids=str,
)
def test_the_length_is_what_lightning_estimates(fit, regression, recorder, arguments):
    module = regression(sgd)
    trainer = fit(module, quiet(linear()), recorder, **arguments)
    total = steps_in_run(trainer, module)
    assert total == trainer.estimated_stepping_batches == trainer.global_step
    assert recorder.values("lr") == expected(linear(), range(total), total)


@pytest.mark.parametrize("interval", ["step", "epoch", "sample"])
def test_a_schedule_of_accumulation_is_followed(fit, regression, recorder, interval):
    accumulation = GradientAccumulationScheduler({0: 1, 2: 4})
    module = regression(sgd)
    trainer = fit(module, quiet(linear(), interval), accumulation, recorder, accumulate_grad_batches=1)
    assert steps_in_run(trainer, module) == trainer.global_step == 9
    positions = {
        "step": (range(9), 9),
        "epoch": ([0] * 4 + [1] * 4 + [2], 3),
        "sample": ([0, 2, 4, 6, 8, 10, 12, 14, 16], 24),
    }
    assert recorder.values("lr") == expected(linear(), *positions[interval])


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(4), torch.ones(2)


@pytest.mark.parametrize(
    ("schedule", "arguments", "message"),
    [
        (
            cosine(),
            {},
            r"the length of the run in steps is not known \(max_epochs=2, max_steps=-1\), and steps=1.0 is a "
            r"fraction of the run; set Trainer\(max_steps=...\), or LRSchedule\(total=...\)\.$",
        ),
        (
            warmup_cosine(0.1),
            {"epochs": -1},
            r"\(max_epochs=-1, max_steps=-1\), and .*; set Trainer\(max_steps=...\), or",
        ),
    ],
)
def test_an_unknown_length_raises_where_it_is_needed(make_trainer, regression, schedule, arguments, message):
    trainer = make_trainer(quiet(schedule), **{"epochs": 2, **arguments})
    with pytest.raises(ValueError, match=message):
        trainer.fit(regression(sgd), DataLoader(Endless(), batch_size=2))


@pytest.mark.parametrize(
    ("interval", "arguments", "endless"),
    [("token", {"count": num_tokens}, False), ("sample", {}, True), ("sample", {"epochs": 2, "max_steps": 4}, True)],
)
def test_advises_only_what_helps(make_trainer, regression, interval, arguments, endless):
    trainer_arguments = {name: arguments.pop(name) for name in ("epochs", "max_steps") if name in arguments}
    trainer = make_trainer(quiet(cosine(), interval, **arguments), **trainer_arguments)
    loader = DataLoader(Endless(), batch_size=2)
    with pytest.raises(ValueError, match=rf"in {interval}s is not known .*; set LRSchedule\(total=...\)\.$"):
        trainer.fit(regression(sgd), loader if endless else DataLoader([(torch.ones(4), torch.ones(2))] * 8, 2))


@pytest.mark.parametrize("schedule", [exponential(0.9), quiet(cosine(), total=10).schedule], ids=["no length", "total"])
def test_an_unknown_length_is_no_matter_otherwise(make_trainer, regression, recorder, schedule):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 4

    total = 10 if schedule == cosine() else None
    trainer = make_trainer(quiet(schedule, total=total), recorder, Stop(), epochs=-1, accumulate_grad_batches=1)
    trainer.fit(regression(sgd), DataLoader(Endless(), batch_size=2))
    assert recorder.values("lr") == expected(schedule, range(4), total)


def test_endless_data_with_max_steps(make_trainer, regression, recorder):
    trainer = make_trainer(quiet(linear()), recorder, epochs=-1, max_steps=5)
    trainer.fit(regression(sgd), DataLoader(Endless(), batch_size=2))
    assert recorder.values("lr") == expected(linear(), range(5), 5)


def test_a_schedule_longer_than_the_run_raises_with_both_numbers(fit, regression):
    sentence = (
        r"^LRSchedule\(schedule=cosine\(min_factor=0.0, steps=20\)\): the run has 6 optimizer steps, but "
        r"cosine\(steps=20\): steps must not exceed total_steps=6\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        fit(regression(sgd), quiet(cosine(steps=20)))


def test_a_later_part_that_does_not_fit_raises_before_training(fit, regression, recorder):
    with pytest.raises(
        ValueError, match=r"the run has 6 optimizer steps, but cosine\(steps=5\): steps must not exceed"
    ):
        fit(regression(sgd), quiet(join(constant(), 2, cosine(steps=5))), recorder)
    assert not recorder.steps


def test_it_does_not_raise_under_fast_dev_run(fit, regression, recorder, printed):
    fit(regression(sgd), LRSchedule(cosine(steps=20)), recorder, fast_dev_run=1)
    assert recorder.values("lr") == [LR]
    assert "LRSchedule: not applied to these 1 optimizer step of fast_dev_run." in printed()


def test_what_fits_is_applied_under_fast_dev_run(fit, regression, recorder):
    fit(regression(sgd), quiet(warmup_cosine(0.1)), recorder, fast_dev_run=2)
    assert recorder.values("lr") == expected(warmup_cosine(0.1), [0], 1)


# --- resuming ---


@pytest.mark.parametrize("interval", ["step", "epoch", "fractional_epoch", "sample"])
@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
def test_resumed_equals_uninterrupted(fit, regression, tmp_path, interval, fused):
    def callbacks():
        return [*([Fuse(verbose=False)] if fused else []), quiet(warmup_cosine(0.3), interval)]

    def configure(module):
        return torch.optim.AdamW(groups_of(module))

    whole, resumed = regression(configure), regression(configure)
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = fit(whole, *callbacks(), save, enable_checkpointing=True)
    again = fit(resumed, *callbacks(), ckpt_path=tmp_path / "epoch=0.ckpt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])
    rates = [[group["lr"] for group in t.optimizers[0].param_groups] for t in (trainer, again)]
    assert rates[0] == rates[1]


class SaveAt(pl.Callback):
    def __init__(self, path, where):
        self.path, self.where = path, where

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.where:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("where", [(0, 0), (1, 1), (1, 2), (1, 3)], ids=str)  # the even ones inside a window
@pytest.mark.parametrize("interval", ["step", "epoch", "fractional_epoch", "sample", "token"])
def test_resumed_in_the_middle_of_an_epoch(fit, regression, recorder, tmp_path, interval, where):
    arguments = dict(total=40, count=num_tokens) if interval == "token" else {}
    whole, resumed = regression(sgd), regression(sgd)
    path = tmp_path / "saved.ckpt"
    fit(whole, quiet(linear(), interval, **arguments), ExactResume(), SaveAt(path, where), recorder)
    expected_rates = recorder.values("lr")[2 * where[0] + (where[1] + 1) // 2 :]
    recorder.steps.clear()
    fit(resumed, quiet(linear(), interval, **arguments), ExactResume(), recorder, ckpt_path=path)
    assert recorder.values("lr") == expected_rates
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("interval", ["step", "epoch", "fractional_epoch", "sample"])
def test_resumed_within_the_last_validation_of_an_epoch(fit, regression, tmp_path, interval, epoch):
    """The epoch is not counted yet, though all its batches are: the run is no epoch longer."""

    class Watch(pl.Callback):
        def __init__(self):
            self.rates = []

        def on_validation_start(self, trainer, pl_module):
            if trainer.current_epoch == epoch and not trainer.sanity_checking and trainer.ckpt_path is None:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

        def on_train_epoch_end(self, trainer, pl_module):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    whole, resumed = Watch(), Watch()
    kwargs = dict(limit_val_batches=1)
    fit(regression(sgd), quiet(linear(), interval), ExactResume(), whole, **kwargs)
    path = tmp_path / "saved.ckpt"
    fit(regression(sgd), quiet(linear(), interval), ExactResume(), resumed, ckpt_path=path, **kwargs)
    assert resumed.rates == whole.rates[epoch:]


def test_the_schedule_grows_with_max_epochs(fit, regression, recorder, tmp_path):
    save = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    fit(regression(sgd), quiet(linear()), save, enable_checkpointing=True)
    fit(regression(sgd), quiet(linear()), recorder, epochs=5, ckpt_path=tmp_path / "last.ckpt")
    assert recorder.values("lr") == expected(linear(), range(6, 10), 10)


def test_a_checkpoint_holds_plain_types(fit, regression, tmp_path):
    save = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    fit(regression(sgd), quiet(linear()), save, enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["LRSchedule"] == {"schedule": repr(linear()), "counted": 0, "pending": 0}
    assert checkpoint["lr_schedulers"] == []


def test_another_schedule_on_resuming_is_said(fit, regression, tmp_path):
    save = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    fit(regression(sgd), quiet(linear()), save, enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"LRSchedule: resumed with cosine\(.*\) in place of linear\("):
        fit(regression(sgd), quiet(cosine()), epochs=4, ckpt_path=tmp_path / "last.ckpt")


def test_a_second_fit_starts_from_the_base_again(fit, regression, recorder):
    kept = []

    def configure(module):
        kept.extend([] if kept else [sgd(module)])
        return kept[0]  # as LightningCLI does

    module = regression(configure)
    fit(module, quiet(linear()))
    fit(module, quiet(linear()), recorder)
    assert recorder.values("lr") == expected(linear())


# --- beside other things ---


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


# --- no side effects, arguments ---


class Broken(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise RuntimeError("broken")


@pytest.mark.parametrize("breaks", [False, True])
def test_the_module_is_as_it_was(fit, regression, breaks):
    module = regression(sgd)
    control = regression(sgd)
    fit(control)
    if breaks:
        with pytest.raises(RuntimeError, match="broken"):
            fit(module, quiet(linear()), Broken())
    else:
        fit(module, quiet(linear()))
    assert vars(module).keys() == vars(control).keys()


def test_says_what_it_does(fit, regression, printed):
    fit(regression(lambda m: torch.optim.SGD(groups_of(m))), LRSchedule(linear()))
    assert f"LRSchedule: lr 0.03 to 0.1 times {linear()!r}, over 6 optimizer steps" in printed()


def test_survives_pickling():
    callback = quiet(linear(), "token", total=9, count=num_tokens)
    assert pickle.loads(pickle.dumps(callback)).schedule == linear()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5,), r"^LRSchedule\(schedule=0.5\): schedule must be a Schedule, such as cosine\(\)\.$"),
        ((linear(), "batch"), r"^LRSchedule\(interval='batch'\): interval must be one of 'step', 'epoch', "),
        ((linear(), "token"), r"^LRSchedule\(count=None\): count must be a function from a batch to its number of tok"),
    ],
)
def test_rejects_bad_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LRSchedule(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total": 0}, r"^LRSchedule\(total=0\): total must be an integer >= 1\.$"),
        ({"count": len}, r"^LRSchedule\(count=...\): count needs interval='sample' or 'token', not 'step'\.$"),
    ],
)
def test_rejects_bad_keywords(arguments, message):
    with pytest.raises(ValueError, match=message):
        LRSchedule(linear(), **arguments)


def test_fractional_epochs_need_equal_epochs(fit, regression):
    with pytest.raises(
        ValueError, match=r"^LRSchedule\(interval='fractional_epoch'\): epochs must have a known and eq"
    ):
        fit(
            regression(sgd),
            quiet(linear(), "fractional_epoch"),
            GradientAccumulationScheduler({1: 2}),
            accumulate_grad_batches=1,
        )


CONFIG = """
seed_everything: false
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_optkit.callbacks.LRSchedule
      init_args:
        interval: step
        schedule:
          class_path: lightning_optkit.schedules.warmup
          init_args:
            steps: 2
            schedule:
              class_path: lightning_optkit.schedules.cosine
              init_args: {min_factor: 0.5}
optimizer:
  class_path: torch.optim.SGD
  init_args: {lr: 0.1}
"""


class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).pow(2).mean()

    def train_dataloader(self):
        return DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 4)), batch_size=2)


def test_from_a_config_file(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    cli = LightningCLI(Plain, run=False, save_config_callback=None, args=["--config", str(tmp_path / "config.yaml")])
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, LRSchedule))
    assert callback.schedule == warmup(cosine(0.5), 2)
    cli.trainer.fit(cli.model)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)
    assert math.isclose(callback.values["lr"], 0.05)


def test_constant_leaves_everything_as_it_was(fit, regression):
    plain, ours = regression(sgd), regression(sgd)
    fit(plain)
    fit(ours, quiet(constant()))
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name])
