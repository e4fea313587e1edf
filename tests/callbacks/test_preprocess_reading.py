# SPDX-License-Identifier: Apache-2.0
"""Preprocess reads each training row once, and that reading leaves no trace in the run."""

import pytest
import torch
from preprocess_cases import ELSEWHERE, ROWS, TARGETS, Seen, inputs_of, loader, running
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_optkit.callbacks import Preprocess
from lightning_optkit.data import Standardize

pytestmark = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")

run = pytest.fixture(running)


class Odd(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        torch.rand(1)  # an augmenting dataset
        return ROWS[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS[:7])


ONLY = [1, 4, 8]
SETS = {
    "shuffled": (lambda: loader(ROWS, shuffle=True, drop_last=True), ROWS),
    "part of the set": (lambda: loader(ROWS, sampler=SubsetRandomSampler(ONLY)), ROWS[ONLY]),
    "drawing dataset": (lambda: DataLoader(Odd(), batch_size=3), ROWS),
    "stream": (lambda: DataLoader(Stream(), batch_size=3), ROWS[:7]),
    "list of batches": (lambda: [[ROWS[:2]], [ROWS[2:5]]], ROWS[:5]),
    "batch sampler": (lambda: DataLoader(TensorDataset(ROWS), batch_sampler=[[0, 1], [5]]), ROWS[[0, 1, 5]]),
    "batch sampler over a part": (
        lambda: DataLoader(TensorDataset(ROWS), batch_sampler=BatchSampler(SubsetRandomSampler(ONLY), 2, False)),
        ROWS[ONLY],
    ),
    "no batching": (lambda: DataLoader(TensorDataset(ROWS[:, None]), batch_size=None), ROWS),
}


@pytest.mark.parametrize("kind", SETS)
def test_each_training_row_is_read_once(run, kind):
    make, rows = SETS[kind]
    if kind == "list of batches":  # for Lightning a list is a list of loaders
        make = lambda: Batches([[ROWS[:2]], [ROWS[2:5]]])  # noqa: E731
    preprocess, module = Preprocess(Standardize()), Seen()
    module.training_step = lambda batch, batch_idx: module.net.weight.mean()
    run(module, [preprocess], train=make(), val=loader(ELSEWHERE, ELSEWHERE))
    stats = preprocess.transform[0]
    assert stats.stats["count"].tolist() == [len(rows)] * 4
    torch.testing.assert_close(stats.mean, rows.double().mean(dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.var, rows.double().var(dim=0, correction=0), rtol=1e-12, atol=0)


class Batches:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_a_sampler_that_draws_is_read_through_the_loader(run):
    make = lambda: loader(ROWS, sampler=WeightedRandomSampler([1.0] + [0.0] * 9, 6))  # noqa: E731
    preprocess = Preprocess(Standardize())
    module = Seen()
    module.training_step = lambda batch, batch_idx: module.net.weight.mean()
    run(module, [preprocess], train=make())
    torch.testing.assert_close(preprocess.transform[0].mean, ROWS[0].double())


def test_a_sampler_that_repeats_rows_is_read_as_it_draws(run):
    data = TensorDataset(ROWS, TARGETS)
    preprocess = Preprocess(Standardize())
    run(Seen(), [preprocess], train=DataLoader(data, sampler=RandomSampler(data, replacement=True, num_samples=23)))
    assert preprocess.transform[0].stats["count"].tolist() == [23] * 4


def test_loaders_side_by_side_are_each_read_once(run):
    module, preprocess = Seen(), Preprocess(Standardize(), field=["b", 0])
    module.training_step = lambda batch, batch_idx: module.net(batch["b"][0]).mean()
    run(module, [preprocess], train={"a": loader(ELSEWHERE, batch_size=1), "b": loader(ROWS)})
    assert preprocess.transform[0].stats["count"].tolist() == [10] * 4


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("own_sampler", [False, True])
def test_fitting_does_not_touch_the_random_numbers_of_the_run(run, own_generator, own_sampler):
    data = TensorDataset(torch.arange(10.0)[:, None].expand(10, 4))
    preprocess = Preprocess(Standardize())

    def train(*callbacks):
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(1) if own_generator else None
        sampler = RandomSampler(data, replacement=True, generator=generator) if own_sampler else None
        kwargs = dict(sampler=sampler) if own_sampler else dict(shuffle=True, generator=generator)
        module = Seen()
        run(module, callbacks, train=DataLoader(data, batch_size=4, **kwargs), epochs=2)
        return inputs_of(module), torch.rand(3)

    plain, after = train()
    transformed, after_too = train(preprocess)
    assert torch.equal(plain, preprocess.inverse(transformed).round()) and torch.equal(after, after_too)


def test_an_iterator_is_refused(run):
    class Once(IterableDataset):
        def __iter__(self):
            return iter(ROWS)

    with pytest.raises(
        ValueError, match=r"Preprocess\(train_dataloaders=.*\): the training data must be readable more"
    ):
        run(Seen(), [Preprocess(Standardize())], train=iter(DataLoader(Once())))
