# SPDX-License-Identifier: Apache-2.0
import random
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_optkit.callbacks import BatchSizeSchedule, ExactResume, Fuse

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.workers import launch

pytestmark = pytest.mark.filterwarnings("ignore")


class Augmented(Dataset):
    """Draws noise from torch, NumPy and Python."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.full((4,), float(index)) / 10 + 0.1 * torch.rand(4) + 0.1 * np.random.rand() + random.random()


class Stream(IterableDataset):
    def __iter__(self):
        yield from (torch.full((4,), index / 10) + 0.1 * torch.rand(4) for index in range(10))


class Plain(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.full((4,), float(index)) / 10


class Dropping(pl.LightningModule):
    def __init__(self, adam=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.adam, self.draws = adam, True

    def training_step(self, batch, batch_idx):
        parts = batch.values() if isinstance(batch, dict) else [batch]
        noise = random.random() + np.random.rand()
        return sum(self.net(part.float()).square().mean() for part in parts) * (1 + noise)

    def validation_step(self, batch, batch_idx):
        torch.rand(1)

    def configure_optimizers(self):
        kind = torch.optim.AdamW if self.adam else torch.optim.SGD
        return kind(self.parameters(), lr=0.01)

    def on_train_epoch_start(self):
        if self.draws:
            torch.rand(3)  # between the checkpoint of an epoch's end and iter()


class SaveAt(pl.Callback):
    def __init__(self, path, where):
        self.path, self.where = path, where

    def save(self, trainer, place):
        if place == self.where and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.save(trainer, (trainer.current_epoch, batch_idx))

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, (trainer.current_epoch, "validation", trainer.fit_loop.batch_idx))

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, (trainer.current_epoch, "end"))


@pytest.fixture
def resumed_and_whole(make_trainer, tmp_path):
    """Weights of the run resumed from `where`, and of the uninterrupted one."""

    def both(where, make_loader, *callbacks, adam=False, exact=True, epochs=3, **kwargs):
        path, results = tmp_path / "saved.ckpt", []
        for ckpt_path in (None, path):
            torch.manual_seed(1 if ckpt_path is None else 99)
            np.random.seed(1 if ckpt_path is None else 99)
            random.seed(1 if ckpt_path is None else 99)
            module = Dropping(adam)
            torch.manual_seed(2 if ckpt_path is None else 98)
            own = [ExactResume()] if exact else []
            own += [SaveAt(path, where)] if ckpt_path is None else []
            trainer = make_trainer(*own, *(make() for make in callbacks), epochs=epochs, **kwargs)
            trainer.fit(module, make_loader(), DataLoader(Plain(), batch_size=5), ckpt_path=ckpt_path)
            results.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        return results

    return both


def augmented(**kwargs):
    return lambda: DataLoader(Augmented(), batch_size=2, **kwargs)


PLACES = [(0, 0), (0, 2), (1, 1), (1, 4), (1, "end"), (0, "end")]


@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_is_bit_identical(resumed_and_whole, where, shuffle, accumulate):
    whole, resumed = resumed_and_whole(where, augmented(shuffle=shuffle), accumulate_grad_batches=accumulate)
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("where", [(0, 2), (1, 4), (0, "end"), (1, "end")], ids=str)
@pytest.mark.parametrize("epochs", [-1, 5])
def test_a_run_of_so_many_steps(resumed_and_whole, where, epochs):
    whole, resumed = resumed_and_whole(where, augmented(shuffle=True), max_steps=8, epochs=epochs)
    assert torch.equal(whole, resumed)


def test_lightning_alone_is_not(resumed_and_whole):
    whole, resumed = resumed_and_whole((1, 1), augmented(shuffle=True), exact=False)
    assert not torch.equal(whole, resumed)


@pytest.mark.parametrize("where", [(1, 1), (1, 4), (1, "end")], ids=str)
def test_own_generator(resumed_and_whole, where):
    make = lambda: DataLoader(Plain(), 2, shuffle=True, generator=torch.Generator().manual_seed(5))  # noqa: E731
    whole, resumed = resumed_and_whole(where, make)
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("where", [(0, 1), (1, 1), (1, "end")], ids=str)
def test_workers_prefetch(resumed_and_whole, where):
    whole, resumed = resumed_and_whole(where, augmented(shuffle=True, num_workers=2), epochs=2)
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("where", [(0, 1), (1, 1), (0, "end")], ids=str)
def test_persistent_workers(resumed_and_whole, where):
    make = lambda: DataLoader(Plain(), 2, shuffle=True, num_workers=2, persistent_workers=True)  # noqa: E731
    whole, resumed = resumed_and_whole(where, make, epochs=3)
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("where", PLACES, ids=str)
def test_iterable(resumed_and_whole, where):
    whole, resumed = resumed_and_whole(where, lambda: DataLoader(Stream(), batch_size=2))
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("where", [(1, 1), (1, 3), (1, "end")], ids=str)
def test_several_loaders(resumed_and_whole, where):
    def make():
        short = DataLoader(Augmented(), batch_size=5, shuffle=True)
        return CombinedLoader({"a": DataLoader(Augmented(), 2, shuffle=True), "b": short}, "max_size_cycle")

    whole, resumed = resumed_and_whole(where, make)
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("where", [(1, 7), (2, 7)], ids=str)
def test_a_short_loader_that_began_anew_long_ago(resumed_and_whole, where):
    def make():
        short = DataLoader(Augmented(), batch_size=2, shuffle=True)  # begins anew in the sixth fetch
        return CombinedLoader({"a": DataLoader(Augmented(), 1, shuffle=True), "b": short}, "max_size_cycle")

    whole, resumed = resumed_and_whole(where, make)
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("where", [(1, 1), (1, "validation", 1), (1, "validation", 3), (1, 2), (1, "end")], ids=str)
def test_validation_in_between(resumed_and_whole, where):
    validate = dict(val_check_interval=2, limit_val_batches=1.0)
    whole, resumed = resumed_and_whole(where, augmented(shuffle=True), **validate)
    assert torch.equal(whole, resumed)


def test_validation_at_the_end(resumed_and_whole):
    whole, resumed = resumed_and_whole((1, "validation", 4), augmented(shuffle=True), limit_val_batches=1.0)
    assert torch.equal(whole, resumed)


def test_under_fuse(resumed_and_whole):
    whole, resumed = resumed_and_whole((1, 1), augmented(shuffle=True), lambda: Fuse(verbose=False), adam=True)
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("kwargs", [{}, dict(max_steps=13)], ids=str)
def test_resumed_from_the_last_batch_of_an_epoch_and_again_within_the_next(make_trainer, tmp_path, kwargs):
    paths, weights, epochs = [tmp_path / f"{number}.ckpt" for number in range(2)], [], []
    for ckpt_path, where in ((None, (0, 4)), (paths[0], (1, 2)), (paths[1], None)):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(1 if ckpt_path is None else 99)
        module, begun = Dropping(), []
        module.on_train_epoch_start = lambda begun=begun, module=module: begun.append(module.current_epoch)
        saves = [SaveAt(paths[len(weights)], where)] if where else []
        trainer = make_trainer(ExactResume(), *saves, epochs=3, accumulate_grad_batches=1, **kwargs)
        trainer.fit(module, augmented(shuffle=True)(), ckpt_path=ckpt_path)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        epochs.append(begun)
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert epochs == [[0, 1, 2], [1, 2], [2]]


class Stateful(DataLoader):
    """Like torchdata's StatefulDataLoader: it skips what it had yielded, without loading it."""

    generator_before = resumed = None
    yielded = 0

    def state_dict(self):
        return {"before": self.generator_before, "yielded": self.yielded}

    def load_state_dict(self, state_dict):
        self.resumed = state_dict

    def __iter__(self):
        first = 0
        if self.resumed:
            torch.set_rng_state(self.resumed["before"])
            first, self.resumed = self.resumed["yielded"], None
        self.generator_before = torch.get_rng_state()
        return self._batches([*self.sampler], first)

    def _batches(self, places, first):
        for number in range(first, len(self)):
            self.yielded = number + 1
            chosen = places[number * self.batch_size : self.yielded * self.batch_size]
            yield torch.stack([self.dataset[place] for place in chosen])


@pytest.mark.parametrize("where", [(0, 1), (1, 1), (1, 3), (1, "end")], ids=str)
def test_loaders_that_restore_themselves(resumed_and_whole, where):
    whole, resumed = resumed_and_whole(where, lambda: Stateful(Augmented(), batch_size=2, shuffle=True))
    assert torch.equal(whole, resumed)


class Interrupt(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.current_epoch == 1 and trainer.fit_loop.batch_idx == 2:
            raise RuntimeError("pulled the plug")

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.path)


def test_an_interrupted_batch_is_run_again(make_trainer, tmp_path):
    weights = []
    for interrupt in (False, True):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        module, path = Dropping(), tmp_path / "exception.ckpt"
        options = dict(accumulate_grad_batches=1)
        if interrupt:
            with pytest.raises(RuntimeError, match="pulled the plug"):
                make_trainer(ExactResume(), Interrupt(path), **options).fit(module, augmented(shuffle=True)())
            module = Dropping()
            make_trainer(ExactResume(), **options).fit(module, augmented(shuffle=True)(), ckpt_path=path)
        else:
            make_trainer(ExactResume(), **options).fit(module, augmented(shuffle=True)())
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


# --- saved after the fit ---


def trained(make_trainer, path, make_loader, ckpt_path=None, saves=True, fails=False, **kwargs):
    """The weights after a fit; `path` is written after it."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(1 if ckpt_path is None else 99)
    module = Dropping()
    module.draws = False
    trainer = make_trainer(ExactResume(), *([Interrupt(path)] if fails else []), **kwargs)
    try:
        trainer.fit(module, make_loader(), DataLoader(Plain(), batch_size=5), ckpt_path=ckpt_path)
    except RuntimeError as error:
        assert fails and str(error) == "pulled the plug"
        path.unlink()
    torch.rand(5), random.random()  # what else is drawn before it is saved
    if saves:
        trainer.save_checkpoint(path)
    return torch.cat([p.detach().flatten() for p in module.parameters()])


AFTER = {
    "epochs": (dict(epochs=2), dict(epochs=4)),
    "accumulated": (dict(epochs=2, accumulate_grad_batches=2), dict(epochs=4, accumulate_grad_batches=2)),
    "steps inside an epoch": (dict(epochs=9, max_steps=7), dict(epochs=9, max_steps=12)),
    "steps at the end of one": (dict(epochs=9, max_steps=10), dict(epochs=9, max_steps=15)),
    "validated": (dict(epochs=2, limit_val_batches=1.0), dict(epochs=4, limit_val_batches=1.0)),
    "failed": (dict(epochs=4, fails=True), dict(epochs=4)),
}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("case", AFTER)
def test_saved_after_the_fit_it_goes_on_as_one_run(make_trainer, tmp_path, case, shuffle):
    first, whole = ({"accumulate_grad_batches": 1, **kwargs} for kwargs in AFTER[case])
    path, make = tmp_path / "after.ckpt", augmented(shuffle=shuffle)
    trained(make_trainer, path, make, **first)
    resumed = trained(make_trainer, path, make, ckpt_path=path, saves=False, **whole)
    assert torch.equal(resumed, trained(make_trainer, path, make, saves=False, **whole))


def test_what_a_run_that_does_nothing_was_given_is_saved_again(make_trainer, tmp_path):
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    trained(make_trainer, first, augmented(), epochs=2)
    trained(make_trainer, second, augmented(), ckpt_path=first, epochs=2)
    states = [torch.load(path, weights_only=True)["callbacks"]["ExactResume"] for path in (first, second)]
    assert torch.equal(*(state["ranks"][0]["now"]["torch"] for state in states))


# --- resumed with other data ---


class Longer(Plain):
    def __len__(self):
        return 12


def plain(data=None, batch_size=2, **kwargs):
    return lambda: DataLoader(data or Plain(), batch_size, **{"shuffle": True, **kwargs})


CHANGED = {
    "samples": (plain(Longer()), "samples 10, .*goes on with samples 12"),
    "fewer samples": (plain(list(range(4)), batch_size=2), "samples 10, .*goes on with samples 4"),
    "batch size": (plain(batch_size=5), "batch size 2, .*goes on with batch size 5"),
    "drop_last": (plain(drop_last=True), "drop_last False and goes on with drop_last True"),
    "order": (plain(shuffle=False), r"sampler RandomSampler\(replacement=False\) and goes on with sampler Seq"),
    "replacement": (
        plain(shuffle=None, sampler=torch.utils.data.RandomSampler(Plain(), replacement=True)),
        r"goes on with sampler RandomSampler\(replacement=True\)",
    ),
    "batch sampler": (
        lambda: DataLoader(Plain(), batch_sampler=torch.utils.data.BatchSampler(range(10), 2, drop_last=False)),
        r"goes on with sampler BatchSampler\(\)",
    ),
    "generator": (plain(generator=torch.Generator()), "own generators 0 and goes on with own generators 1"),
    "loaders": (lambda: CombinedLoader([plain()(), plain()()]), r"loaders 1, .*goes on with loaders 2"),
}


@pytest.mark.parametrize("where", [(1, 2), (1, "end")], ids=str)
@pytest.mark.parametrize("case", CHANGED)
@pytest.mark.filterwarnings("default")
def test_says_what_is_not_as_it_was(make_trainer, tmp_path, case, where):
    path, (changed, message) = tmp_path / "saved.ckpt", CHANGED[case]
    make_trainer(ExactResume(), SaveAt(path, where), epochs=2).fit(Dropping(), plain()())
    module = Dropping()
    module.training_step = lambda batch, batch_idx: module.net(torch.ones(2, 4)).square().mean()
    with pytest.warns(UserWarning, match=rf"^ExactResume: the run was saved with .*{message}.*; it is not exact\.$"):
        make_trainer(ExactResume(), epochs=3).fit(module, changed(), ckpt_path=path)


@pytest.mark.filterwarnings("default")
def test_says_that_the_batches_of_an_epoch_are_others(make_trainer, tmp_path):
    path = tmp_path / "saved.ckpt"
    make_trainer(ExactResume(), SaveAt(path, (1, 2)), epochs=2).fit(Dropping(), plain()())
    with pytest.warns(UserWarning, match=r"batches per epoch 5 and goes on with batches per epoch 4; it is not exact"):
        make_trainer(ExactResume(), epochs=3, limit_train_batches=4).fit(Dropping(), plain()(), ckpt_path=path)


@pytest.mark.filterwarnings("default")
def test_says_that_workers_draw_others(make_trainer, tmp_path):
    path = tmp_path / "saved.ckpt"
    make_trainer(ExactResume(), SaveAt(path, (1, 2)), epochs=2).fit(Dropping(), plain()())
    with pytest.warns(UserWarning, match=r"with num_workers 0 and goes on with num_workers 1; what its data set draws"):
        make_trainer(ExactResume(), epochs=3).fit(Dropping(), plain(num_workers=1)(), ckpt_path=path)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.filterwarnings("default")
def test_says_that_workers_of_loaders_that_restore_themselves_draw_others(make_trainer, tmp_path, num_workers):
    path = tmp_path / "saved.ckpt"
    make = lambda: Stateful(Plain(), batch_size=2, shuffle=True, num_workers=num_workers)  # noqa: E731
    make_trainer(ExactResume(), SaveAt(path, (1, 2)), epochs=2).fit(Dropping(), make())
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        make_trainer(ExactResume(), epochs=3).fit(Dropping(), make(), ckpt_path=path)
    expected = "ExactResume: a loader that restores itself does not restore what its workers draw."
    assert said(records) == [expected] * num_workers


def said(records):
    return [str(record.message) for record in records if "ExactResume" in str(record.message)]


SAME = {
    "batch size schedule": (lambda: [BatchSizeSchedule({1: 5}, verbose=False)], {}),
    "reloaded": (list, dict(reload_dataloaders_every_n_epochs=1)),
    "another length of the run": (list, dict(max_steps=12)),
}


@pytest.mark.parametrize("where", [(0, 2), (0, "end"), (1, 1)], ids=str)
@pytest.mark.parametrize("case", SAME)
@pytest.mark.filterwarnings("default")
def test_says_nothing_of_what_is_as_it_was(make_trainer, tmp_path, case, where):
    path, (make, kwargs) = tmp_path / "saved.ckpt", SAME[case]
    make_trainer(ExactResume(), *make(), SaveAt(path, where), epochs=2).fit(Dropping(), plain()())
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        make_trainer(ExactResume(), *make(), epochs=3, **kwargs).fit(Dropping(), plain()(), ckpt_path=path)
    assert said(records) == []


@pytest.mark.filterwarnings("default")
def test_a_checkpoint_that_says_nothing_of_the_data_is_resumed(make_trainer, tmp_path):
    path = tmp_path / "saved.ckpt"
    make_trainer(ExactResume(), SaveAt(path, (1, 2)), epochs=2).fit(Dropping(), plain()())
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["callbacks"]["ExactResume"]["loaders"], checkpoint["callbacks"]["ExactResume"]["num_workers"]
    torch.save(checkpoint, path)
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        make_trainer(ExactResume(), epochs=3).fit(Dropping(), plain()(), ckpt_path=path)
    assert said(records) == []


# --- its manners ---


@pytest.mark.parametrize("fails", [False, True])
def test_the_loops_are_left_as_they_were(make_trainer, fails, tmp_path):
    trainer = make_trainer(ExactResume(), *([Interrupt(tmp_path / "x.ckpt")] if fails else []))
    if fails:
        with pytest.raises(RuntimeError):
            trainer.fit(Dropping(), augmented()())
    else:
        trainer.fit(Dropping(), augmented()())
    loops = [trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop]
    ours = {"run", "on_run_start", "_on_before_fetch", "_load_combined_loader_states"}
    assert not any(ours & set(vars(loop)) for loop in loops)


def test_training_is_the_same_with_and_without(make_trainer):
    weights = []
    for callbacks in ([], [ExactResume()]):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        module = Dropping()
        make_trainer(*callbacks).fit(module, augmented(shuffle=True)())
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


def test_given_twice(make_trainer):
    lightnings, ours = "more than one stateful callback of type `ExactResume`", r"ExactResume\(\): given twice"
    with pytest.raises((RuntimeError, ValueError), match=f"{lightnings}|{ours}"):
        make_trainer(ExactResume(), ExactResume()).fit(Dropping(), augmented()())


def test_progress_is_told(resumed_and_whole, printed, monkeypatch):
    monkeypatch.setattr("lightning_optkit.callbacks._order_of_epoch.SECONDS_BETWEEN_MESSAGES", 0.0)
    resumed_and_whole((1, 2), augmented())
    assert "skipped 3 of 3 batches already seen" in printed()


def test_two_processes(tmp_path):
    launch(Path(__file__).with_name("exact_resume_worker.py"), tmp_path, processes=2, timeout=120)
    for rank in range(2):
        whole, *others = (torch.load(tmp_path / f"{name} {rank}.pt") for name in ("whole", "resumed", "longer"))
        assert [len(other["seen"]) for other in others] == [6, 4]
        for other in others:
            expected = {**whole, "seen": whole["seen"][-len(other["seen"]) :]}
            torch.testing.assert_close(other, expected, rtol=0, atol=0)
        for every in (1, 2):  # loaders made after the resume have the seed of the run, not of the process
            whole, resumed = (torch.load(tmp_path / f"{name} {every} {rank}.pt") for name in ("whole", "resumed"))
            assert len(resumed["seen"]) == 10
            torch.testing.assert_close(resumed, {**whole, "seen": whole["seen"][-10:]}, rtol=0, atol=0)


def test_one_process_that_fails_leaves_a_file_at_once(tmp_path):
    worker = Path(__file__).with_name("exception_worker.py")
    launch(worker, tmp_path, "raises", processes=2, timeout=100)
    failed = [torch.load(tmp_path / f"raises {rank}.pt") for rank in range(2)]
    assert [each["error"] for each in failed] == ["RuntimeError", "KeyError"]
    assert all(each["took"] < 10 for each in failed)  # the time-out of the group is 30 minutes
    ranks = torch.load(tmp_path / "raises.ckpt", weights_only=True)["callbacks"]["ExactResume"]["ranks"]
    assert [rank is None for rank in ranks] == [False, True]
    launch(worker, tmp_path, "resumed", processes=2, timeout=100)
    for rank in range(2):
        whole, resumed = (torch.load(tmp_path / f"{name} {rank}.pt") for name in ("whole", "resumed from raises"))
        assert (
            resumed["error"] is None and resumed["seen"] == whole["seen"][-13:]
        )  # the batch that failed, and all since
        said = ["without the random states of the processes [1]"] * (not rank)
        assert len(resumed["said"]) == len(said) and all(part in resumed["said"][0] for part in said)
