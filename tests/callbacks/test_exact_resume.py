# SPDX-License-Identifier: Apache-2.0
"""Resumed from anywhere in an epoch, over data of any kind, a run has the weights of one that was never stopped."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from exact_resume_cases import Augmented, Dropping, Interrupt, Plain, SaveAt, Stateful, augmented
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from lightning_optkit.callbacks import ExactResume, Fuse
from tests.workers import launch

pytestmark = pytest.mark.filterwarnings("ignore")


class Stream(IterableDataset):
    def __iter__(self):
        yield from (torch.full((4,), index / 10) + 0.1 * torch.rand(4) for index in range(10))


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


@pytest.mark.parametrize("where", [(0, 1), (1, 1), (1, 3), (1, "end")], ids=str)
def test_loaders_that_restore_themselves(resumed_and_whole, where):
    whole, resumed = resumed_and_whole(where, lambda: Stateful(Augmented(), batch_size=2, shuffle=True))
    assert torch.equal(whole, resumed)


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
