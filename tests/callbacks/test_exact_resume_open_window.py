# SPDX-License-Identifier: Apache-2.0
"""Gradients of an open window, and what an exception leaves: a batch is repeated as it was, or it is said."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_optkit.callbacks import ExactResume, LRSchedule, _open_window
from lightning_optkit.callbacks._rest_of_epoch import fill_in
from lightning_optkit.callbacks.scheduling.clock import steps_in_run
from lightning_optkit.schedules import linear

LOST = "ExactResume: the first step misses the gradients of its batches from before the checkpoint."
pytestmark = pytest.mark.filterwarnings("ignore", "error:ExactResume")
BATCHES = 6


class Failure(Exception):
    pass


class Samples(Dataset):
    """Fails once, at the access of this number."""

    def __init__(self, fails_at=None):
        self.fails_at, self.accesses = fails_at, 0

    def __len__(self):
        return 2 * BATCHES

    def __getitem__(self, index):
        self.accesses += 1
        if self.accesses == self.fails_at:
            raise Failure
        return torch.tensor([float(index), 1.0]) / 10


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(2, 1)

    def loss(self, batch):
        return self.net(batch + torch.rand(1)).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Windows(Net):
    """Accumulates four batches by itself."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 4)
        if batch_idx % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()


class ClearsFirst(Net):
    """Clears its gradients before they are made, so that used ones are left after a batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class In(pl.Callback):
    """Acts in a hook of a batch, once."""

    def __init__(self, hook, batch, act):
        self.batch, self.act = batch, act
        setattr(self, hook, self.once)

    def once(self, trainer, *args):
        if (trainer.current_epoch, trainer.fit_loop.batch_idx) == self.batch:
            self.batch = None
            self.act(trainer)


def fail(trainer):
    raise Failure


class Validated(Windows):
    """Lightning clears the gradients of manual optimization before a validation, also of one that a stop makes."""

    def validation_step(self, batch, batch_idx):
        pass

    def val_dataloader(self):
        return DataLoader(Samples(), 2)


def fit(make=Net, ckpt_path=None, callbacks=(), data=None, path=None, is_exact=True, **kwargs):
    torch.manual_seed(1 if ckpt_path is None else 2)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        max_epochs=3,
        callbacks=[*([ExactResume()] if is_exact else []), *callbacks],
        **kwargs,
    )
    module = make()
    try:
        trainer.fit(module, DataLoader(data or Samples(), 2, shuffle=True), ckpt_path=ckpt_path)
    except Failure:
        return None
    if path is not None:
        trainer.save_checkpoint(path)
    return module.net.weight.tolist()


@pytest.mark.parametrize("batch", [(0, 2), (1, 0), (1, 2), (1, 3), (1, 5)], ids=str)
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_zero_grad"])
@pytest.mark.parametrize("make, window", [(Net, 4), (Net, 1), (Windows, 1), (ClearsFirst, 1)])
def test_an_exception_before_the_backward_pass(tmp_path, make, window, hook, batch):
    if hook == "on_before_zero_grad" and (make is not Net or batch[1] % window):
        hook = "on_train_batch_start"  # it is called only where a window begins
    kwargs = dict(make=make, accumulate_grad_batches=window)
    assert fit(callbacks=[In(hook, batch, fail), OnExceptionCheckpoint(tmp_path, "x")], **kwargs) is None
    assert fit(ckpt_path=tmp_path / "x.ckpt", **kwargs) == fit(**kwargs)


@pytest.mark.parametrize("make, window", [(Net, 4), (Windows, 1)])
@pytest.mark.parametrize("batch, is_lost", [((1, 0), False), ((1, 2), True)], ids=str)
def test_gradients_of_half_a_batch_are_left_out_with_a_warning(tmp_path, make, window, batch, is_lost):
    if make is Windows and not is_lost:
        batch = (1, 4)  # six batches are a window and a half, and it accumulates on
    kwargs = dict(make=make, accumulate_grad_batches=window)
    fit(callbacks=[In("on_after_backward", batch, fail), OnExceptionCheckpoint(tmp_path, "x")], **kwargs)
    if is_lost:
        with pytest.raises(UserWarning, match=LOST):
            fit(ckpt_path=tmp_path / "x.ckpt", **kwargs)
    else:
        assert fit(ckpt_path=tmp_path / "x.ckpt", **kwargs) == fit(**kwargs)


@pytest.mark.parametrize("access", [1, 5, 2 * BATCHES + 1, 2 * BATCHES + 6])
@pytest.mark.parametrize("window", [1, 4])
def test_an_exception_while_a_batch_is_fetched(tmp_path, window, access):
    kwargs = dict(accumulate_grad_batches=window)
    fit(callbacks=[OnExceptionCheckpoint(tmp_path, "x")], data=Samples(access), **kwargs)
    assert fit(ckpt_path=tmp_path / "x.ckpt", **kwargs) == fit(**kwargs)


@pytest.mark.parametrize("batch", [(0, 1), (0, 3), (0, 5), (1, 0), (1, 4)], ids=str)
@pytest.mark.parametrize("make", [Windows, ClearsFirst])
def test_manual_optimization(tmp_path, make, batch):
    path = tmp_path / "saved.ckpt"
    whole = fit(make, callbacks=[In("on_train_batch_end", batch, lambda trainer: trainer.save_checkpoint(path))])
    assert fit(make, path) == whole
    (state,) = torch.load(path, weights_only=True)["callbacks"]["ExactResume"]["ranks"]
    assert bool(state["gradients"]) == (make is Windows and batch[1] != 3)


@pytest.mark.parametrize("batch", [(0, 0), (0, 1), (0, 4), (1, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("make", [Windows, Validated])
def test_manual_optimization_of_a_run_that_was_stopped(tmp_path, make, batch):
    def stop(trainer):
        trainer.should_stop = True

    fit(make, callbacks=[In("on_train_batch_end", batch, stop)], path=tmp_path / "saved.ckpt")
    assert fit(make, tmp_path / "saved.ckpt") == fit(make)


@pytest.mark.parametrize("batch", [(0, 2), (0, 5), (1, 0), (1, 2), (2, 1), (2, 3)], ids=str)
def test_windows_that_grow(tmp_path, batch):
    path, make = tmp_path / "saved.ckpt", lambda: GradientAccumulationScheduler({0: 2, 1: 3, 2: 4})
    save = In("on_train_batch_end", batch, lambda trainer: trainer.save_checkpoint(path))
    assert fit(callbacks=[save, make()]) == fit(ckpt_path=path, callbacks=[make()])


class Rates(pl.Callback):
    """Records the rate of each step, and the length of the run as known at its start."""

    def __init__(self):
        self.rates, self.total = {}, None

    def on_train_start(self, trainer, pl_module):
        self.total = steps_in_run(trainer, pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates[trainer.global_step] = optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("batch", [(0, 2), (0, 5), (1, 0), (1, 2), (1, 4), (1, 5), (2, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("is_before", [True, False])
def test_schedules_know_the_window_of_the_epoch_they_are_resumed_in(tmp_path, batch, is_before):
    path, whole, resumed = tmp_path / "saved.ckpt", Rates(), Rates()

    def callbacks():
        both = [GradientAccumulationScheduler({0: 1, 1: 3, 2: 2}), LRSchedule(linear(), verbose=False)]
        return both if is_before else both[::-1]

    save = In("on_train_batch_end", batch, lambda trainer: trainer.save_checkpoint(path))
    assert fit(callbacks=[save, *callbacks(), whole]) == fit(ckpt_path=path, callbacks=[*callbacks(), resumed])
    assert whole.total == resumed.total == len(whole.rates) == 6 + 2 + 3
    assert resumed.rates.items() <= whole.rates.items()


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_schedules_know_that_window_without_exact_resume(tmp_path):
    path, whole, resumed = tmp_path / "saved.ckpt", Rates(), Rates()

    def callbacks():
        return [GradientAccumulationScheduler({0: 1, 1: 3, 2: 2}), LRSchedule(linear(), verbose=False)]

    save = In("on_train_batch_end", (1, 4), lambda trainer: trainer.save_checkpoint(path))
    fit(callbacks=[save, *callbacks(), whole], is_exact=False)
    fit(ckpt_path=path, callbacks=[*callbacks(), resumed], is_exact=False)
    assert whole.total == resumed.total == 6 + 2 + 3
    assert resumed.rates[7] == whole.rates[7]


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_part_of_zeros_is_saved_since_other_processes_may_have_others(tmp_path, monkeypatch, is_sharded):
    class Zeros(Windows):
        def loss(self, batch):
            return super().loss(batch) * 0

    monkeypatch.setattr(_open_window, "are_rows", lambda grad: is_sharded)
    fit(Zeros, callbacks=[In("on_train_batch_end", (1, 0), lambda trainer: trainer.save_checkpoint(tmp_path / "x"))])
    (saved,) = torch.load(tmp_path / "x")["callbacks"]["ExactResume"]["ranks"]
    assert [*saved["gradients"]] == (["net.weight", "net.bias"] if is_sharded else [])


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("kwargs", [{}, dict(max_steps=14)], ids=str)
def test_saved_in_the_first_hook_of_an_epoch(tmp_path, epoch, kwargs):
    class Save(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == epoch:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    assert fit(callbacks=[Save()], **kwargs) == fit(ckpt_path=tmp_path / "saved.ckpt", **kwargs)


@pytest.mark.parametrize(
    ("gradients", "said"),
    [
        ({}, "of the processes [1]; the run goes on with the same data, but not exactly."),
        (
            {"net.weight": {"part": torch.ones(1, 2), "shape": (1, 2)}},
            "of the processes [1], and without their gradients of the open accumulation window, which the first step "
            "misses; the run goes on with the same data, but not exactly; resume from a checkpoint written before it "
            "to have that step whole.",
        ),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_what_other_processes_could_not_save_on_an_exception_is_named(rank, gradients, said):
    drawn = dict.fromkeys(("python", "numpy", "torch", "cuda", "own"))
    ranks = [{"now": drawn, "gradients": gradients}, None]
    with pytest.warns(UserWarning) as records:
        fill_in(ranks, rank, drawn)
    (record,) = records
    assert str(record.message).endswith(f"without the random states {said}")
    assert ranks[1] == (None if rank == 0 else {"now": drawn, "gradients": {}})
