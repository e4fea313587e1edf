# SPDX-License-Identifier: Apache-2.0
"""LRSchedule finds the length of the run, or says that it needs to be told."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lr_schedule_cases import LR, expected, num_tokens, quiet, sgd
from torch.utils.data import DataLoader, IterableDataset

from lightning_optkit.callbacks import LRSchedule
from lightning_optkit.callbacks.scheduling.clock import steps_in_run
from lightning_optkit.schedules import constant, cosine, exponential, join, linear, warmup_cosine

pytestmark = pytest.mark.filterwarnings("ignore:You (defined|passed in) a .*Skipping val loop")


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
