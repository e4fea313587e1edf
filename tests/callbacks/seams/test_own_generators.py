# SPDX-License-Identifier: Apache-2.0
"""Random generators of data sets, samplers and modules go on, in a resumed run, where they were."""

import random
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from runs_saved_once import Saves, trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset

from lightning_optkit.callbacks.seams.own_generators import generators_of, set_state_of, state_of

pytestmark = pytest.mark.filterwarnings("ignore")
SAMPLES = 12
GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(0),
    "PCG64": lambda: np.random.default_rng(0),
    "Philox": lambda: np.random.Generator(np.random.Philox(0)),
    "MT19937": lambda: np.random.RandomState(0),
    "Python": lambda: random.Random(0),
}
DRAWS = {"torch": lambda g: float(torch.rand(1, generator=g)), "Python": lambda g: g.gauss(0, 1)}


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_state_gives_the_same_numbers(kind, tmp_path):
    generator, other = GENERATORS[kind](), GENERATORS[kind]()
    draw = DRAWS.get(kind, lambda g: g.normal())
    draw(generator)
    torch.save(state_of(generator), tmp_path / "state.pt")
    set_state_of(other, torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draw(generator) for _ in range(5)] == [draw(other) for _ in range(5)]


class Noisy(Dataset):
    def __init__(self, kind, lazy=False):
        self.kind, self.lazy = kind, lazy
        self.rng = None if lazy else GENERATORS[kind]()

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        self.rng = self.rng or GENERATORS[self.kind]()
        return torch.tensor([index + DRAWS.get(self.kind, lambda g: g.normal())(self.rng)])


class Stream(IterableDataset):
    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __iter__(self):
        return (torch.tensor([float(each)]) for each in self.rng.permutation(SAMPLES))


class Shuffled(Sampler):
    def __init__(self):
        self.rng = random.Random(0)

    def __iter__(self):
        return iter(self.rng.sample(range(SAMPLES), SAMPLES))

    def __len__(self):
        return SAMPLES


class Collate:
    def __init__(self):
        self.parts = {"noise": [np.random.default_rng(0)]}

    def __call__(self, scale, batch):
        return torch.stack(batch) + scale * self.parts["noise"][0].normal()


class Plain(Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return torch.tensor([float(index)])


LOADERS = {
    **{kind: partial(lambda kind: DataLoader(Subset(Noisy(kind), range(SAMPLES)), 2, shuffle=True), kind)
       for kind in GENERATORS},
    "made for the first sample": lambda: DataLoader(Noisy("PCG64", lazy=True), 2),
    "stream": lambda: DataLoader(Stream(), 2),
    "sampler": lambda: DataLoader(Plain(), 2, sampler=Shuffled()),
    "collate": lambda: DataLoader(Plain(), 2, collate_fn=partial(Collate(), 0.1)),
    "bound method": lambda: DataLoader(Plain(), 2, collate_fn=partial(Collate().__call__, 0.1)),
    "module": lambda: DataLoader(Plain(), 2),
}  # fmt: skip


class Net(pl.LightningModule):
    def __init__(self, draws=False):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.seen, self.draws = nn.Linear(1, 1), {}, draws
        self.net.noise = torch.Generator().manual_seed(0)  # of a layer
        self.held = SimpleNamespace(draws={"shift": [np.random.default_rng(0)]})

    def training_step(self, batch, batch_idx):
        if self.draws:
            batch = batch + torch.rand(1, generator=self.net.noise) + self.held.draws["shift"][0].random()
        self.seen[self.current_epoch, batch_idx] = batch.flatten().tolist()
        return self.net(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        torch.rand(1, generator=self.net.noise)  # the training goes on behind what a validation drew

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(loader, *callbacks, draws=False, ckpt_path=None):
    torch.manual_seed(1 if ckpt_path is None else 2)
    module = Net(draws)
    trainer(*callbacks).fit(module, loader, DataLoader(Plain(), SAMPLES), ckpt_path=ckpt_path)
    return module


PLACES = {
    "in the first epoch": ("on_train_batch_end", (0, 3)),
    "within an epoch": ("on_train_batch_end", (1, 1)),
    "in a validation": ("on_validation_end", (1,)),
    "at an epoch's end": ("on_train_epoch_end", (1,)),
}


@pytest.mark.parametrize(
    "kind, place",
    [*((kind, "within an epoch") for kind in LOADERS), ("sampler", "at an epoch's end"),
     *((kind, place) for kind in ("PCG64", "module") for place in PLACES if place != "within an epoch")],
)  # fmt: skip
def test_a_resumed_run_draws_as_one_run(tmp_path, kind, place):
    path, draws = tmp_path / "saved.ckpt", kind == "module"
    whole = fit(LOADERS[kind](), Saves(path, *PLACES[place]), draws=draws)
    resumed = fit(LOADERS[kind](), draws=draws, ckpt_path=path)
    assert resumed.seen and resumed.seen.items() <= whole.seen.items()
    assert resumed.net.weight.item() == whole.net.weight.item()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("now", [Plain, partial(Noisy, "Python")], ids=["none", "another"])
def test_a_generator_that_is_not_there_is_said(tmp_path, now):
    path = tmp_path / "saved.ckpt"
    fit(DataLoader(Noisy("PCG64"), 2), Saves(path, "on_train_batch_end", (1, 1)))
    with pytest.warns(UserWarning, match=r"generators of its own that are not here \(loader 0.dataset.rng\)"):
        fit(DataLoader(now(), 2), ckpt_path=path)


def test_what_is_searched():
    loader = DataLoader(Plain(), 2, shuffle=True, generator=torch.Generator())
    loader.dataset.parts, loader.dataset.self = [random.Random(0)] * 40, loader.dataset
    assert not generators_of([loader], nn.Linear(1, 1), [loader.generator])  # it is known; and the list is long
    loader.dataset.parts = (loader.generator, torch.default_generator, np.random.default_rng())
    names = ["module.net.noise", "loader 0.dataset.parts[2]", "module.held.draws['shift'][0]"]
    assert list(generators_of([loader], Net(), [loader.generator])) == names


def test_what_a_callback_has_put_in_place_of_a_method_is_not_searched():
    module = pl.LightningModule()
    callbacks = SimpleNamespace(generator=torch.Generator())
    module.on_after_batch_transfer = partial(print, callbacks)
    module.users = partial(print, callbacks)
    assert [*generators_of([], module, [])] == ["module.users.args[0].generator"]
    del module.users
    assert generators_of([], module, []) == {}


def test_a_generator_is_named_alike_whether_or_not_lightning_saw_its_loader_made():
    names = []
    for is_seen in (True, False):
        loader = DataLoader(Noisy("PCG64"), 2)
        seen = {"__pl_saved_args": (loader.dataset,), "__dataset": loader.dataset} if is_seen else {}
        loader.__dict__ = {**seen, **vars(loader)}
        names.append(list(generators_of([loader], nn.Linear(1, 1), [])))
    assert names == [["loader 0.dataset.rng"]] * 2
