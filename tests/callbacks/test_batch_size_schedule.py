# SPDX-License-Identifier: Apache-2.0
"""BatchSizeSchedule: the batches and the rate of each step, what it leaves as it was, and what it refuses."""

import csv
from itertools import chain
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from batch_size_schedule_cases import GROWS, SHRINKS, Seen, flat, schedule, sgd, training, twelve
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_optkit.callbacks import BatchRegime, BatchSizeSchedule, ExactResume, Fuse
from lightning_optkit.schedules import constant, linear, piecewise_constant
from tests.workers import launch

pytestmark = pytest.mark.filterwarnings("ignore")

train = pytest.fixture(training)


# --- what each step saw ---


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("sizes", [GROWS, SHRINKS], ids=["grows", "shrinks"])
def test_an_epoch_is_each_sample_once_in_batches_of_its_size(train, shuffle, workers, sizes):
    loader = twelve(shuffle=shuffle, num_workers=workers, persistent_workers=workers > 0)
    callback = schedule(sizes)
    _, trainer, seen = train(callback, loader=loader)
    expected = [sizes.get(epoch, 2) for epoch in range(3)]
    assert seen.sizes() == [[size] * (12 // size) for size in expected]
    assert seen.lengths == [12 // size for size in expected]
    for batches in seen.batches.values():
        order = list(chain(*batches))
        assert sorted(order) == list(range(12))
        assert shuffle == (order != list(range(12)))
    assert trainer.global_step == 11
    assert callback.samples_seen == 36


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scaling, power", [("none", 0.0), ("linear", 1.0), ("sqrt", 0.5)])
def test_each_step_equals_a_plain_loop(train, regression, recorder, accumulate, scaling, power):
    module, *_ = train(schedule(GROWS, scaling), recorder, accumulate_grad_batches=accumulate)
    plain, rates = regression(sgd), []
    optimizer = sgd(plain)
    for size in (2, 4, 6):
        optimizer.param_groups[0]["lr"] = 0.1 * (size / 2) ** power
        batches = list(twelve(size))
        for index, batch in enumerate(batches):
            (plain.loss(batch) / accumulate).backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(batches):
                optimizer.step()
                optimizer.zero_grad()
                rates.append(optimizer.param_groups[0]["lr"])
    assert recorder.values("lr") == rates
    assert torch.equal(flat(module), flat(plain))


def test_until_the_first_change_all_is_as_without(train):
    _, _, plain = train(loader=twelve(shuffle=True))
    _, _, ours = train(schedule({2: 6}), loader=twelve(shuffle=True))
    assert [ours.batches[epoch] for epoch in (0, 1)] == [plain.batches[epoch] for epoch in (0, 1)]


def test_a_schedule_is_a_factor_of_the_loaders_own_size(train):
    _, _, seen = train(schedule(piecewise_constant([1, 2], [1.0, 1.4, 2.6])), loader=twelve(3))
    assert [sizes[0] for sizes in seen.sizes()] == [3, 4, 8]
    assert seen.sizes()[2] == [8, 4]


def test_total_is_the_length_of_the_run(train):
    _, _, seen = train(schedule(piecewise_constant([0.5], [1.0, 2.0]), total=4))
    assert [sizes[0] for sizes in seen.sizes()] == [2, 2, 4]


def test_an_iterable_of_known_batch_size(train):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from twelve().dataset

    _, _, seen = train(schedule(), loader=DataLoader(Stream(), batch_size=2))
    assert seen.sizes() == [[2] * 6, [4] * 3, [6] * 2]


@pytest.mark.parametrize("limit, expected", [(2, [2, 2, 2]), (0.5, [3, 1, 1])])
def test_limit_train_batches(train, limit, expected):
    assert train(schedule(), limit_train_batches=limit)[2].lengths == expected


def test_a_loader_that_is_made_anew(train, regression, make_trainer):
    module, seen, made = regression(sgd), Seen(), twelve()
    module.train_dataloader = lambda: made
    trainer = make_trainer(schedule(), seen, reload_dataloaders_every_n_epochs=1, accumulate_grad_batches=1)
    trainer.fit(module)
    assert seen.sizes() == [[2] * 6, [4] * 3, [6] * 2]
    assert made.batch_size == 2


def test_validation_within_an_epoch(regression, make_trainer):
    class Validations(pl.Callback):
        def __init__(self):
            self.at = []

        def on_validation_start(self, trainer, pl_module):
            self.at.append((trainer.current_epoch, trainer.fit_loop.batch_idx + 1))

    spy, options = Validations(), dict(num_sanity_val_steps=0, limit_val_batches=1, accumulate_grad_batches=1)
    make_trainer(schedule(), spy, val_check_interval=0.5, **options).fit(regression(sgd), twelve(), twelve())
    assert spy.at == [(0, 3), (0, 6), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
    with pytest.raises(ValueError, match=r"epoch 1 has 3 batches and would not be validated; give a float"):
        make_trainer(schedule(), val_check_interval=4, **options).fit(regression(sgd), twelve(), twelve())


def test_progress_bars_see_the_length_of_the_epoch(regression, make_trainer):
    class Bar(TQDMProgressBar):
        totals = ()

        def on_train_epoch_start(self, trainer, pl_module):
            super().on_train_epoch_start(trainer, pl_module)
            self.totals += (self.train_progress_bar.total,)

    bar = Bar()
    make_trainer(bar, schedule(), enable_progress_bar=True, accumulate_grad_batches=1).fit(regression(sgd), twelve())
    assert bar.totals == (6, 3, 2)


# --- before and after ---


class Fails(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1:
            raise ZeroDivisionError


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("resumes", [False, True])
def test_all_is_left_as_it_was(regression, make_trainer, fails, resumes):
    module, loader = regression(sgd), twelve()
    callbacks = [schedule(GROWS, "sqrt"), *([ExactResume()] * resumes), *([Fails()] * fails)]
    trainer = make_trainer(*callbacks, accumulate_grad_batches=1)
    if fails:
        with pytest.raises(ZeroDivisionError):
            trainer.fit(module, loader)
    else:
        trainer.fit(module, loader)
    assert loader.batch_size == loader.batch_sampler.batch_size == 2
    (group,) = trainer.optimizers[0].param_groups
    assert group["lr"] == group["initial_lr"] == 0.1
    assert not {"initial_lr_factor", "initial_lr_unscaled"} & group.keys()
    loop = trainer.fit_loop
    assert "setup_data" not in vars(loop)
    assert "on_run_start" not in vars(loop.epoch_loop)
    assert "dataloader" not in vars(loop._data_source)


def test_fuse_gives_the_same(train):
    options = dict(gradient_clip_val=0.5, accumulate_grad_batches=2)
    adam = lambda module: torch.optim.AdamW(module.parameters(), lr=0.01)  # noqa: E731
    weights = [
        flat(train(*extra, schedule(GROWS, "sqrt"), configure=adam, **options)[0])
        for extra in ([], [Fuse(verbose=False)])
    ]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_it_is_logged_and_told(train, tmp_path, printed):
    logger = CSVLogger(tmp_path)
    train(schedule(GROWS, "linear", log=True, verbose=True), logger=logger, log_every_n_steps=1)
    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").open()))
    assert [float(row["batch_size"]) for row in rows] == [2] * 6 + [4] * 3 + [6] * 2
    assert [float(row["samples_seen"]) for row in rows][-2:] == [24, 30]
    assert "batch size 4 from epoch 1, base learning rates times 2\n" in printed()
    assert "batch size 2" not in printed()


def test_fast_dev_run(train):
    assert train(schedule(piecewise_constant([5], [1.0, 2.0])), fast_dev_run=True)[2].sizes() == [[2]]


# --- two processes ---


def test_two_processes(tmp_path):
    worker, results = Path(__file__).with_name("batch_size_schedule_worker.py"), {}
    for processes in (1, 2):
        path = tmp_path / f"{processes}.pt"
        launch(worker, path, processes, processes=processes, timeout=200)
        results[processes] = torch.load(path)
    assert results[1]["steps"] == 6 + 3 + 2
    assert results[1]["samples"] == 72
    torch.testing.assert_close(results[2], results[1], rtol=0, atol=1e-6)
    weights = [results[1][name]["net.weight"] for name in ("weights", "full", "mini", "single")]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(weights) for b in weights[:i])


# --- bad input ---


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(schedule={}), ValueError, r"BatchSizeSchedule\(schedule={}\): schedule must have at least one epoch"),
        (dict(schedule={-1: 4}), ValueError, r"BatchSizeSchedule\(schedule=-1\): schedule must be an integer >= 0"),
        (dict(schedule={1: 0}), ValueError, r"BatchSizeSchedule\(schedule\[1\]=0\): schedule\[1\] must be an integer"),
        (dict(schedule={1: 2.0}), TypeError, r"BatchSizeSchedule\(schedule\[1\]=2.0\)"),
        (dict(schedule=4), TypeError, r"BatchSizeSchedule\(schedule=4\): schedule must be a Schedule"),
        (dict(schedule={1: 4}, lr_scaling="cubic"), ValueError, r"lr_scaling must be one of 'none', 'linear', 'sqrt'"),
        (dict(schedule={1: 4}, total=0), ValueError, r"BatchSizeSchedule\(total=0\): total must be an integer >= 1"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        BatchSizeSchedule(**arguments)


class Odd(BatchSampler):
    pass


@pytest.mark.parametrize(
    "loader, message",
    [
        (
            DataLoader(range(12), batch_sampler=Odd(SequentialSampler(range(12)), 2, False)),
            "Odd, a batch_sampler with rules",
        ),
        (DataLoader(range(12), batch_size=None), r"DataLoader\(batch_size=None\), whose dataset makes the batches"),
        ([twelve(), twelve()], "list, which is no DataLoader"),
        (
            DataLoader(range(12), batch_sampler=twelve().batch_sampler),
            r"DataLoader\(batch_sampler=BatchSampler\(\.\.\.\)\), which has none",
        ),
    ],
)
def test_a_loader_whose_size_is_its_own(train, loader, message):
    with pytest.raises(ValueError, match=rf"BatchSizeSchedule\(...\): the batch size of {message}.*; give one"):
        train(schedule(), loader=loader)


@pytest.mark.parametrize(
    "callbacks, kwargs, message",
    [
        ([schedule(), BatchRegime(2)], {}, r"BatchSizeSchedule\(...\) and BatchRegime\(...\): both set the batch size"),
        ([schedule(constant(factor=0.1))], {}, r"the batch size would be 0 at epoch 0; it must be at least 1"),
        ([schedule({2: 16})], {}, r"with batch size 16 and drop_last=True an epoch has no batch"),
        (
            [schedule(linear())],
            dict(epochs=-1, max_steps=4),
            r"unknown number of epochs, and .*BatchSizeSchedule\(total",
        ),
        ([schedule(piecewise_constant([5], [1.0, 2.0]))], {}, r"the run has 3 epochs, and "),
        ([schedule({1: 4, 3: 6})], {}, r"the run has 3 epochs, and never comes to epoch 3\.$"),
    ],
)
def test_bad_runs(train, callbacks, kwargs, message):
    loader = twelve(drop_last=True)
    with pytest.raises(ValueError, match=message):
        train(*callbacks, loader=loader, **kwargs)
    assert loader.batch_size == 2
