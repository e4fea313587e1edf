# SPDX-License-Identifier: Apache-2.0
"""A test of rates leaves the data where they were, and optimizers that the module exchanges within it."""

import random

import numpy as np
import pytest
import torch
from lr_finder_cases import Net, data, finder, fit, same
from torch.utils.data import DataLoader, Dataset, Sampler

pytestmark = pytest.mark.filterwarnings("ignore")


class Noisy(Dataset):
    """Draws each row from a generator of its own, or from that of the process or worker."""

    def __init__(self, rng=None):
        self.transform = {"rng": rng}

    def __len__(self):
        return 64

    def __getitem__(self, index):
        rng = self.transform["rng"]
        if isinstance(rng, np.random.Generator):
            x = torch.from_numpy(rng.normal(size=4)).float()
        elif isinstance(rng, random.Random):
            x = torch.tensor([rng.random() for _ in range(4)])
        else:
            x = torch.randn(4, generator=rng)
        return x, x[:2]


class Shuffled(Sampler):
    def __init__(self):
        self.rng = random.Random(0)

    def __iter__(self):
        return iter(self.rng.sample(range(256), 256))

    def __len__(self):
        return 256


def in_workers():
    return DataLoader(Noisy(), 16, shuffle=True, num_workers=1, persistent_workers=True)


LOADERS = {
    "NumPy": lambda: DataLoader(Noisy(np.random.default_rng(0)), 16),
    "Python": lambda: DataLoader(Noisy(random.Random(0)), 16),
    "torch": lambda: DataLoader(Noisy(torch.Generator().manual_seed(0)), 16),
    "sampler": lambda: data(shuffle=False, sampler=Shuffled()),
    "workers": in_workers,
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_data_go_on_as_without_it(name):
    tested, plain = Net(), Net()
    fit(tested, finder(apply=False), loader=LOADERS[name]())
    fit(plain, loader=LOADERS[name]())
    assert same(tested, plain)


def test_workers_of_an_earlier_fit_go_on():
    nets = []
    for callbacks in ([finder(apply=False, num_steps=20)], []):
        loader, net = in_workers(), Net()
        fit(net, loader=loader)
        workers = loader._iterator
        fit(net, *callbacks, loader=loader)
        assert loader._iterator is workers
        nets.append(net)
    assert same(*nets)


class Exchanging(Net):
    """Sets another optimizer as its second epoch begins: a new list of them, or in the same."""

    is_list_new = True

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            new = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
            if self.is_list_new:
                self.trainer.strategy.optimizers = [new]
            else:
                self.trainer.optimizers[0] = new


@pytest.mark.parametrize("is_list_new", [True, False])
def test_optimizers_that_the_module_exchanges(is_list_new):
    tested, plain = Exchanging(), Exchanging()
    tested.is_list_new = plain.is_list_new = is_list_new
    fit(tested, finder(apply=False))
    fit(plain)
    assert same(tested, plain) and tested.rates[-1] == plain.rates[-1]


def test_groups_and_tensors_in_them_are_the_same_objects():
    rate = torch.tensor(0.05)
    net = Net(configure=lambda module: torch.optim.AdamW(module.parameters(), lr=rate))

    class Seen(finder().__class__):
        def on_fit_start(self, trainer, pl_module):
            group = trainer.optimizers[0].param_groups[0]
            super().on_fit_start(trainer, pl_module)
            self.is_same = trainer.optimizers[0].param_groups[0] is group and group["lr"] is rate

    seen = Seen(num_steps=20, apply=False, verbose=False)
    fit(net, seen)
    assert seen.is_same and rate == 0.05
